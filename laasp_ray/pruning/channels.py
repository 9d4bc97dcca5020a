"""The effect of removing channels from a module: the axes of its tensors and the attributes that change.

A module has an output side (its own filters or channels). Convolutions and linear layers also have an input side. A
prune is a set of removed channels at each of several sides. `plan_of` converts it to a Plan.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from laasp_ray.errors import PruningError
from laasp_ray.pruning.plan import AttributeValue, Kept, Plan

Role = Literal["filters", "inputs", "channels"]


@dataclass(frozen=True)
class CannotPrune:
    """In the place of a layer's channels: why none of them can be removed."""

    reason: str


@dataclass(frozen=True)
class TensorAxis:
    """One axis of a tensor that channels lie along. `per_block`: each block has its own axis (grouped convolutions)."""

    tensor: str
    axis: int
    per_block: bool = False


@dataclass(frozen=True)
class ChannelAxis:
    """The channels on one side of a module (or of a raw parameter).

    There are `size` channels in `blocks` equal contiguous blocks, which must lose the same number each. `role`: a
    layer's own filters, a layer's inputs, or the channels of something else. `normalises`: the module computes
    statistics over its channels, so removing one changes the others' values, or no layer reads the channels. Such a
    prune is measured on a pruned copy. `filters_per_input`: the number of filters that a depthwise convolution has for
    each input.
    """

    module: str
    role: Role
    size: int
    blocks: int
    axes: tuple[TensorAxis, ...]
    attributes: tuple[str, ...]
    normalises: bool = False
    filters_per_input: int = 1


Removal = Mapping[ChannelAxis, Collection[int]]
"""Side -> channels to remove, for every side that a prune changes."""


def unite(total: dict[ChannelAxis, set[int]], removal: Removal) -> None:
    """Adds a removal to `total`, so that both are one prune."""
    for side, channels in removal.items():
        total.setdefault(side, set()).update(channels)


def plan_of(removal: Removal) -> Plan:
    """The plan that removes these channels. Raises PruningError if a side would lose all channels, or unequal
    shares.
    """
    tensors: dict[str, dict[int, Kept]] = {}
    attributes: dict[str, dict[str, AttributeValue]] = {}
    layers: dict[str, tuple[int, ...]] = {}
    known: dict[tuple[int, int, frozenset[int]], tuple[tuple[int, ...], Kept]] = {}
    for side, removed in removal.items():
        if not removed:
            continue
        alike = side.size, side.blocks, frozenset(removed)  # many sides of a prune lose the same channels
        if alike not in known:
            kept = tuple(index for index in range(side.size) if index not in alike[2])
            known[alike] = kept, _parts(side, kept)
        kept, parts = known[alike]
        for axis in side.axes:
            tensors.setdefault(axis.tensor, {})[axis.axis] = parts if axis.per_block else (kept,)
        for name in side.attributes:
            value: AttributeValue = (len(kept),) if name == "normalized_shape" else len(kept)
            if name in ("in_channels", "groups") and side.role == "filters":
                value = len(kept) // side.filters_per_input
            attributes.setdefault(side.module, {})[name] = value
        if side.role == "filters":
            layers[side.module] = kept
    return Plan(tensors=tensors, attributes=attributes, layers=layers)


def _parts(side: ChannelAxis, kept: tuple[int, ...]) -> Kept:
    width = side.size // side.blocks
    in_blocks: list[list[int]] = [[] for _ in range(side.blocks)]
    for index in kept:
        in_blocks[index // width].append(index % width)
    parts = tuple(map(tuple, in_blocks))
    counts = {len(part) for part in parts}
    if not kept or counts == {0}:
        raise PruningError(f"all {side.size} {side.role} of {side.module} would go; at least one must stay")
    if len(counts) > 1:
        raise PruningError(
            f"the {side.role} of {side.module} fall in {side.blocks} blocks that must lose the same "
            f"count each, but {sorted(counts)} would be left"
        )
    return parts


def describe(name: str, module: nn.Module, *, inputs: bool) -> ChannelAxis | CannotPrune | None:
    """A module's input side, if `inputs`, or else its output side.

    None says that it is of no type with channels of its
    own, though its parameters may have some.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(name, module, inputs)
    if isinstance(module, nn.Linear):
        axis, attribute, size = (
            (1, "in_features", module.in_features) if inputs else (0, "out_features", module.out_features)
        )
        return _checked(
            module,
            ChannelAxis(
                name,
                "inputs" if inputs else "filters",
                size,
                1,
                _axes(name, module, axis, bias=not inputs),
                (attribute,),
            ),
        )
    return _normalisation(name, module)


def parameter_side(name: str, axis: int, size: int) -> ChannelAxis:
    """The channels along `axis` of a parameter that belongs to no known layer, such as a learned scale."""
    return ChannelAxis(name.rpartition(".")[0], "channels", size, 1, (TensorAxis(name, axis),), ())


def _convolution(name: str, conv: nn.modules.conv._ConvNd, inputs: bool) -> ChannelAxis | CannotPrune:
    if is_depthwise(conv):
        return _checked(
            conv,
            ChannelAxis(
                name,
                "filters",
                conv.out_channels,
                1,
                _axes(name, conv, 0, bias=True),
                ("out_channels", "in_channels", "groups"),
                filters_per_input=conv.out_channels // conv.in_channels,
            ),
        )
    axis = int(inputs) if not conv.transposed else int(not inputs)
    axes = _axes(name, conv, axis, bias=not inputs, per_block=conv.groups > 1 and axis == 1)
    if inputs:
        return _checked(conv, ChannelAxis(name, "inputs", conv.in_channels, conv.groups, axes, ("in_channels",)))
    return _checked(conv, ChannelAxis(name, "filters", conv.out_channels, conv.groups, axes, ("out_channels",)))


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution applies separate filters to each channel, so that its inputs and outputs are removed
    together.
    """
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and module.groups > 1
        and module.groups == module.in_channels
        and (module.out_channels == module.in_channels or not module.transposed)
    )


def _normalisation(name: str, module: nn.Module) -> ChannelAxis | CannotPrune | None:
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return _simple(name, module, "num_features", module.num_features)
    if isinstance(module, nn.GroupNorm):
        return _simple(name, module, "num_channels", module.num_channels, blocks=module.num_groups, normalises=True)
    if isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            return None
        return _simple(name, module, "normalized_shape", module.normalized_shape[0], normalises=True)
    if isinstance(module, nn.PReLU):
        return _simple(name, module, "num_parameters", module.num_parameters) if module.num_parameters > 1 else None
    return None


def _simple(
    name: str, module: nn.Module, attribute: str, size: int, *, blocks: int = 1, normalises: bool = False
) -> ChannelAxis | CannotPrune:
    leaves = ("weight", "bias", "running_mean", "running_var")
    axes = tuple(TensorAxis(f"{name}.{leaf}", 0) for leaf in leaves if getattr(module, leaf, None) is not None)
    return _checked(module, ChannelAxis(name, "channels", size, blocks, axes, (attribute,), normalises))


def _axes(name: str, module: nn.Module, axis: int, *, bias: bool, per_block: bool = False) -> tuple[TensorAxis, ...]:
    weight = TensorAxis(f"{name}.weight", axis, per_block)
    return (weight, TensorAxis(f"{name}.bias", 0)) if bias and module.bias is not None else (weight,)


def _checked(module: nn.Module, side: ChannelAxis) -> ChannelAxis | CannotPrune:
    """The side, or a reason: tensors that a parametrisation computes cannot be cut."""
    for axis in side.axes:
        leaf = axis.tensor.rpartition(".")[2]
        if leaf not in module._parameters and leaf not in module._buffers:
            return CannotPrune(f"{axis.tensor} is computed by a parametrisation; remove that first")
    return side
