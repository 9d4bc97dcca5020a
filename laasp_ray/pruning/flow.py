"""Follows a network's channels: the network is run once, and its tensors carry the numbers of their channels
(labels.py).

Every operation that PyTorch carries out is seen with its tensors, whatever Python code called it. A rule
(flow_rules.py) says what each operation does to channels. One run gives the coupling of all layers, so the cost is
linear in the size of the network. If an operation has no rule, the channels that it reads cannot be removed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from laasp_ray.pruning.labels import Channels, Label, along, varying


@dataclass(frozen=True)
class Meeting:
    """An operation in which channels disappear: the run's call number `call` of that name, in `module`.

    `reads`: it sums products over them (a layer, or two multiplied values), along `dim` of its argument `argument`. A
    channel set to zero there adds nothing. `holds`: it computes a statistic over them (a mean, a norm), which changes
    when one is removed. `kept`: the labels of each tensor of the statistic. `owner` is the parameter that reads the
    channels.
    """

    kind: Literal["reads", "holds"]
    call: int
    module: str
    channels: np.ndarray
    operation: str
    argument: int = 0
    dim: int = 0
    kept: tuple[tuple[Label, ...], ...] = ()
    owner: str = ""


@dataclass
class Flow:
    """The results of a run. `lines` has the channels (n,) of each (parameter or buffer, axis).

    `stuck`: channels that cannot be removed, with the reason. `blocks`: lines of channels in equal blocks that must
    lose the same number each, with the operation that cuts them. `used`: the parameters that the run read. `bare`:
    the channels of each module that has channels, but no tensor along them.
    """

    channels: Channels = field(default_factory=Channels)
    lines: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    stuck: list[tuple[np.ndarray, str]] = field(default_factory=list)
    blocks: list[tuple[np.ndarray, int, str]] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    bare: dict[str, np.ndarray] = field(default_factory=dict)
    starts: dict[int, tuple[str, int]] = field(default_factory=dict)

    def add_line(self, name: str, axis: int, size: int) -> np.ndarray:
        """Adds new channels along an axis of a parameter or buffer."""
        line = self.channels.new(size)
        self.lines[name, axis] = line
        self.starts[int(line[0])] = (name, axis)
        return line

    def owner(self, line: np.ndarray | None) -> str:
        """The parameter or buffer that has exactly these channels along one of its axes; empty if there is none."""
        if line is None or not len(line):
            return ""
        found = self.starts.get(int(line[0]))
        return found[0] if found is not None and np.array_equal(self.lines[found], line) else ""


class Follower(TorchDispatchMode):
    """Follows channels through a network that is run inside `with`.

    `grouped` has the input and output lines of grouped convolutions, by the name of their weight.
    """

    def __init__(
        self, model: nn.Module, flow: Flow, grouped: dict[tuple[str, str], np.ndarray], refused: Mapping[str, str]
    ) -> None:
        """`refused`: module -> the reason why its channels cannot be removed."""
        super().__init__()
        self.refused = refused
        self.flow, self.grouped = flow, grouped
        self.calls: Counter[str] = Counter()
        self._labels = WeakTensorKeyDictionary()
        self._names = WeakTensorKeyDictionary()
        self._modules: list[str] = [""]
        self._hooks: list[Any] = []
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names[tensor] = name
            axes = [axis for axis in range(tensor.ndim) if (name, axis) in flow.lines]
            self.set(tensor, [along(flow.lines[name, axis], axis, tensor.ndim) for axis in axes])
        for name, module in model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._modules.append(name)))
            self._hooks.append(module.register_forward_hook(self._leave))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from laasp_ray.pruning.flow_rules import follow  # flow_rules imports this class

        kwargs = kwargs or {}
        shapes = {id(tensor): tuple(tensor.shape) for tensor in tensors_of((args, kwargs))}
        out = func(*args, **kwargs)
        self.calls[name_of(func)] += 1
        if any(self._labels.get(tensor) for tensor in tensors_of((args, kwargs))):
            follow(self, Call(func, args, kwargs, out, shapes))
        return out

    def _leave(self, *_: object) -> None:
        self._modules.pop()

    @property
    def module(self) -> str:
        """The innermost module that is running."""
        return self._modules[-1]

    def get(self, tensor: Any) -> list[Label]:
        """A tensor's labels. Empty for other values."""
        if not isinstance(tensor, torch.Tensor):
            return []
        if tensor in self._names:
            self.flow.used.add(self._names[tensor])
        return self._labels.get(tensor) or []

    def set(self, tensor: Any, labels: Sequence[Label]) -> None:
        if isinstance(tensor, torch.Tensor):
            self._labels[tensor] = [label for label in labels if label.ndim == tensor.ndim and varying(label)]

    def stick(self, labels: Sequence[Label], reason: str) -> None:
        """Records that these channels cannot be removed."""
        for label in labels:
            self.flow.stuck.append((np.unique(label.numpy()), reason))

    def owner(self, weight: torch.Tensor, line: np.ndarray | None) -> str:
        """The parameter that a weight is, or that it is computed from if its `line` of channels shows that."""
        return self._names.get(weight) or self.flow.owner(line)

    def where(self) -> str:
        """The running module, for messages."""
        return f" in {self.module}" if self.module else ""


@dataclass(frozen=True)
class Call:
    """One executed operation. `shapes`: id of a tensor argument -> its shape before the operation."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    shapes: dict[int, tuple[int, ...]]

    @property
    def name(self) -> str:
        return name_of(self.func)

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument, by its name in the operation's schema."""
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                return self.kwargs.get(name, argument.default_value if argument.has_default_value() else default)
        return default

    @property
    def outputs(self) -> list[torch.Tensor]:
        return list(tensors_of(self.out))


def name_of(func: Any) -> str:
    """An operation's plain name. The in-place form has the same name."""
    return str(func._schema.name).rpartition("::")[2].rstrip("_")


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested arguments or results."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
