"""Checks by running a network that removing channels has the same effect as silencing them.

The coupling is read from one run, which cannot show everything that a network does (sizes in the code of its forward
pass, for example). So every layer is tried: the network without the channels must give the outputs of the network whose
readers get zeros for those channels. Statistics over channels change when one is removed, so they are held at their
earlier values; then a norm must give the same, too. The check is in float64, so that even an unimportant channel shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from laasp_ray.errors import PruningError, is_out_of_memory
from laasp_ray.models.copying import deep_copy
from laasp_ray.pruning.channels import Removal, plan_of
from laasp_ray.pruning.flow import Meeting, name_of, tensors_of
from laasp_ray.pruning.labels import Label, line, varying
from laasp_ray.pruning.plan import apply_plan

_TOLERANCE = {torch.float64: 1e-8}
"""Largest allowed difference, relative to the largest output: far above rounding, far below the effect of a wrong
channel.
"""
_ROUGH = 1e-4
"""The same for a network that computes in less than float64 whatever its input."""

MIXED = (
    "removing them is not the same as silencing them: the network mixes its channels in a way that a "
    "run of it does not show"
)


def clone_sharing_parameters(model: nn.Module) -> nn.Module:
    """A copy of a network that shares the parameters' memory, but has its own Parameter objects and buffers.

    The copy may be pruned and moved, and its `requires_grad` may be set. Its parameters must not be written to.
    """
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad) for parameter in model.parameters()
    }
    return deep_copy(model, memo)


def scramble(model: nn.Module, example: torch.Tensor) -> None:
    """Gives normalisations and learned scales fixed random values with which every channel matters.

    In a new network most channels are equal (scales 1, offsets 0) or nearly zero, and a confusion between them would
    not show. Running statistics are set so that `example` keeps its scale from layer to layer.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return (torch.rand(tensor.shape, generator=generator) * (high - low) + low).to(tensor.dtype)

    def set_statistics(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        square = inputs[0].square().mean()
        module.running_mean = uniform(module.get_buffer("running_mean"), -0.25, 0.25) * square.sqrt()
        module.running_var = uniform(module.get_buffer("running_var"), 0.5, 1.5) * square

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.numel() == max(parameter.shape, default=0):
                parameter.data = uniform(parameter, -0.25, 0.25) if name == "bias" else uniform(parameter, 0.5, 1.5)
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(set_statistics))
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()


def fault_of(
    model: nn.Module, example: torch.Tensor, removal: Removal, meetings: Sequence[Meeting], gone: np.ndarray
) -> str | None:
    """The reason why this removal is wrong, or None. `model` is on the CPU, in eval mode, and is not changed.

    `meetings` are the operations in which its channels disappear, from a run of it. `gone` (n,) says for every channel
    number whether it is removed.
    """
    pruned = clone_sharing_parameters(model)
    try:
        apply_plan(pruned, plan_of(removal))
    except PruningError as error:
        return str(error)
    with torch.no_grad():
        with _Silenced(meetings, gone) as record:
            wanted = list(tensors_of(model(example)))
        try:
            with _Held(meetings, gone, record.statistics):
                found = list(tensors_of(pruned(example)))
        except Exception as error:  # the network's own code may raise any error, and the error is the result
            if is_out_of_memory(error):
                raise
            return (
                "the network does not run without them, its code fixes how many there are "
                f"({type(error).__name__}: {_first_line(error)})"
            )
    return difference(wanted, found)


class _AtMeetings(TorchDispatchMode):
    """Acts on operations in which removed channels disappear. They are found by name and call number."""

    def __init__(self, meetings: Sequence[Meeting], gone: np.ndarray) -> None:
        super().__init__()
        self._gone = gone
        self._calls: Counter[str] = Counter()
        self._at: dict[tuple[str, int], list[Meeting]] = {}
        for meeting in meetings:
            if gone[meeting.channels].any():
                self._at.setdefault((meeting.operation, meeting.call), []).append(meeting)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = name_of(func)
        key = (name, self._calls[name])
        self._calls[name] += 1
        return self._perform(func, args, kwargs or {}, key, self._at.get(key, []))

    def _perform(self, func: Any, args: Any, kwargs: Any, key: tuple[str, int], meetings: list[Meeting]) -> Any:
        raise AssertionError("a subclass says what is done")


class _Silenced(_AtMeetings):
    """Gives readers zeros for the removed channels, and records the statistics over them."""

    def __init__(self, meetings: Sequence[Meeting], gone: np.ndarray) -> None:
        super().__init__(meetings, gone)
        self.statistics: dict[tuple[str, int], list[Any]] = {}

    def _perform(self, func: Any, args: Any, kwargs: Any, key: tuple[str, int], meetings: list[Meeting]) -> Any:
        given = list(args)
        for meeting in meetings:
            if meeting.kind == "reads":
                silent = torch.from_numpy(np.flatnonzero(self._gone[meeting.channels]))
                given[meeting.argument] = given[meeting.argument].index_fill(meeting.dim, silent, 0)
        out = func(*given, **kwargs)
        for meeting in meetings:
            if meeting.kind == "holds":
                self.statistics[key] = _statistics(key[0], args, out, meeting, self._gone)
        return out


class _Held(_AtMeetings):
    """Replaces statistics by the recorded ones."""

    def __init__(
        self, meetings: Sequence[Meeting], gone: np.ndarray, statistics: Mapping[tuple[str, int], list[Any]]
    ) -> None:
        super().__init__(meetings, gone)
        self._statistics = statistics

    def _perform(self, func: Any, args: Any, kwargs: Any, key: tuple[str, int], meetings: list[Meeting]) -> Any:
        if key not in self._statistics:
            return func(*args, **kwargs)
        held = self._statistics[key]
        if key[0] == "native_layer_norm":
            return _normalised(args[0], held, args[2], args[3], dim=-1, groups=0)
        if key[0] == "native_group_norm":
            return _normalised(args[0], held, args[1], args[2], dim=1, groups=int(args[6]))
        if "batch_norm" in key[0]:
            return _normalised_by_channel(args[0], held, args[1], args[2])
        if key[0].lstrip("_") in ("softmax", "log_softmax"):
            logarithm = args[0] - held[0]
            return logarithm if "log" in key[0] else logarithm.exp()
        found = list(held)
        out = func(*args, **kwargs)
        return found[0] if isinstance(out, torch.Tensor) else tuple(found)


def _statistics(name: str, args: Any, out: Any, meeting: Meeting, gone: np.ndarray) -> list[Any]:
    """The statistics that an operation computed over channels, without the removed channels of the result."""
    if name.lstrip("_") in ("softmax", "log_softmax"):
        whole = args[0].logsumexp(args[1], keepdim=True)
        dim = args[1] % args[0].ndim
        return [_cut(whole, [label for label in meeting.kept[0] if dim not in varying(label)], gone)]
    tensors = list(tensors_of(out))
    return [_cut(tensor.clone(), labels, gone) for tensor, labels in zip(tensors, meeting.kept, strict=True)]


def _cut(tensor: torch.Tensor, labels: Sequence[Label], gone: np.ndarray) -> torch.Tensor:
    for label in labels:
        for dim in varying(label) if len(varying(label)) == 1 else ():
            left = torch.from_numpy(np.flatnonzero(~gone[line(label)]))
            tensor = tensor.index_select(dim, left)
    return tensor


def _normalised(
    values: torch.Tensor, held: Sequence[torch.Tensor], weight: Any, bias: Any, *, dim: int, groups: int
) -> tuple[torch.Tensor, ...]:
    """Normalises by held means and reciprocal deviations: over the last dimension, or over `groups` groups of dimension
    1.
    """
    shape = [1] * values.ndim
    shape[dim] = -1
    mean, deviation = held[1], held[2]
    if groups:
        each = values.reshape(values.shape[0], groups, -1)
        result = ((each - mean[..., None]) * deviation[..., None]).reshape(values.shape)
    else:
        result = (values - mean) * deviation
    if weight is not None:
        result = result * weight.reshape(shape)
    if bias is not None:
        result = result + bias.reshape(shape)
    return result, mean, deviation


def _normalised_by_channel(
    values: torch.Tensor, held: Sequence[torch.Tensor], weight: Any, bias: Any
) -> tuple[torch.Tensor, ...]:
    shape = [1, -1, *[1] * (values.ndim - 2)]
    result = (values - held[1].reshape(shape)) * held[2].reshape(shape)
    if weight is not None:
        result = result * weight.reshape(shape)
    if bias is not None:
        result = result + bias.reshape(shape)
    return result, held[1], held[2]


def difference(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> str | None:
    """How outputs differ, beyond rounding, from those wanted; None if they do not."""
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (wanted, found)]
    if shapes[0] != shapes[1]:
        return f"the network's outputs would change shape from {shapes[0]} to {shapes[1]}"
    for before, after in zip(wanted, found, strict=True):
        if not before.numel():
            continue
        if not before.is_floating_point():
            if not torch.equal(before, after):
                return MIXED
            continue
        if not bool(before.isfinite().all()):
            return "the network's outputs are not finite, so that nothing can be compared"
        scale = float(before.abs().max())
        if not float((before - after).abs().max()) <= _TOLERANCE.get(before.dtype, _ROUGH) * scale:
            return MIXED
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
