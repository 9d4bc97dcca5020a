"""Where a network's channels go: it is run once, and the numbers of its channels (labels.py) go along with its tensors.

Every operation that PyTorch carries out, whatever Python code asked for it, is seen with its tensors. What each does
to channels is said by a rule (flow_rules.py). One pass over the network gives the coupling of all its layers, so the
cost is linear in the network. An operation without a rule keeps the channels that it reads from being removed.
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
    """An operation in which channels disappear: the `call`th of the run with its name, in `module`.

    `reads`: it sums products over them (a layer, or two values multiplied), along `dim` of its argument `argument`; a
    channel set to zero there adds nothing. `holds`: it takes a statistic over them (a mean, a norm), which changes
    when one is removed. `kept`: the labels of each tensor that a statistic gives. `owner` is the parameter that reads.
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
    """What a run showed. `lines` has the channels (n,) of each (parameter or buffer, axis).

    `stuck`: channels that cannot be removed, with the reason. `blocks`: lines of channels that fall in equal blocks,
    each of which must lose as many, with what cuts them. `used`: parameters that took part.
    """

    channels: Channels = field(default_factory=Channels)
    lines: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    stuck: list[tuple[np.ndarray, str]] = field(default_factory=list)
    blocks: list[tuple[np.ndarray, int, str]] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    starts: dict[int, tuple[str, int]] = field(default_factory=dict)

    def add_line(self, name: str, axis: int, size: int) -> np.ndarray:
        """New channels along an axis of a parameter or buffer."""
        line = self.channels.new(size)
        self.lines[name, axis] = line
        self.starts[int(line[0])] = (name, axis)
        return line

    def owner(self, line: np.ndarray | None) -> str:
        """The parameter or buffer along one of whose axes just these channels lie; empty if there is none."""
        if line is None or not len(line):
            return ""
        found = self.starts.get(int(line[0]))
        return found[0] if found is not None and np.array_equal(self.lines[found], line) else ""


class Follower(TorchDispatchMode):
    """Follows channels through the run of a network, inside `with`. `grouped` has the input (or output) lines of
    grouped convolutions, by the name of their weight."""

    def __init__(
        self, model: nn.Module, flow: Flow, grouped: dict[tuple[str, str], np.ndarray], refused: Mapping[str, str]
    ) -> None:
        """`refused` says of modules why their channels cannot be removed."""
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
        from laasp_ray.pruning.flow_rules import follow  # which needs this class for its types

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
        """The innermost module that is being run."""
        return self._modules[-1]

    def get(self, tensor: Any) -> list[Label]:
        """A tensor's labels; none for what is no tensor."""
        if not isinstance(tensor, torch.Tensor):
            return []
        if tensor in self._names:
            self.flow.used.add(self._names[tensor])
        return self._labels.get(tensor) or []

    def set(self, tensor: Any, labels: Sequence[Label]) -> None:
        if isinstance(tensor, torch.Tensor):
            self._labels[tensor] = [label for label in labels if label.ndim == tensor.ndim and varying(label)]

    def stick(self, labels: Sequence[Label], reason: str) -> None:
        """These channels cannot be removed."""
        for label in labels:
            self.flow.stuck.append((np.unique(label.numpy()), reason))

    def owner(self, weight: torch.Tensor, line: np.ndarray | None) -> str:
        """The parameter that a weight is, or is computed from, as far as `line` along it tells."""
        return self._names.get(weight) or self.flow.owner(line)

    def where(self) -> str:
        """For messages: the module that is being run."""
        return f" in {self.module}" if self.module else ""


@dataclass(frozen=True)
class Call:
    """One operation that was carried out. `shapes`: those of its arguments before, by id."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    shapes: dict[int, tuple[int, ...]]

    @property
    def name(self) -> str:
        return name_of(self.func)

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operation's schema."""
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
    """An operation's plain name, the same for its form that works in place."""
    return str(func._schema.name).rpartition("::")[2].rstrip("_")


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in arguments or results, however nested."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
