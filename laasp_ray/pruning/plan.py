"""The kept part of every tensor of a pruned network: a record of a prune that can be replayed.

A plan holds the kept indices for every changed axis of every parameter and buffer, and the matching module attributes.
Applied to the network that it was made for, it removes everything else. Plans compose: applying `first.then(second)`
equals applying one after the other, bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from laasp_ray.errors import PruningError

if TYPE_CHECKING:  # replaying a plan needs no counter
    from laasp_ray.cost.macs import Macs

PLAN_VERSION, WITH_BIASES = 1, 2
"""Of a plan's JSON form. Only a plan with new biases has the second, so that others can be read by earlier versions."""

Kept = tuple[tuple[int, ...], ...]
"""Kept indices of one axis: one tuple for all rows, or one for each group of a grouped convolution."""

AttributeValue = int | tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A prune of a network.

    `tensors`: state-dict name -> axis -> kept indices, rising. Axis 0 is selected first. Axis 1 may hold one tuple for
    each group of a grouped convolution: the remaining rows are divided into as many equal contiguous blocks, and each
    block keeps its own columns. `attributes`: module -> attribute -> value afterwards. `layers`: convolution or linear
    layer -> the filters it keeps. All indices are for the network that the plan is made for. `biases` (sorted) are the
    layers without a bias that get one, of zeros, before anything is selected.
    """

    tensors: Mapping[str, Mapping[int, Kept]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, AttributeValue]] = field(default_factory=dict)
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    biases: tuple[str, ...] = ()

    @staticmethod
    def empty() -> Plan:
        """The plan that keeps everything."""
        return Plan()

    @property
    def is_empty(self) -> bool:
        return not self.tensors and not self.attributes and not self.biases

    def with_biases(self, layers: Iterable[str]) -> Plan:
        """This plan, and new biases for `layers`, which have as many values as the layers keep filters."""
        tensors, new = dict(self.tensors), set(layers) - set(self.biases)
        for name in new:
            kept = self.tensors.get(f"{name}.weight", {}).get(0)
            if kept is not None:
                tensors[f"{name}.bias"] = {0: kept}
        return replace(self, tensors=tensors, biases=tuple(sorted({*self.biases, *new}))) if new else self

    def then(self, step: Plan) -> Plan:
        """This plan followed by `step`. The indices of `step` are for the network after this plan.

        Raises PruningError if `step` keeps an index that this plan removes.
        """
        before = self.with_biases(step.biases)
        tensors = {name: dict(axes) for name, axes in before.tensors.items()}
        for name, axes in step.tensors.items():
            tensors[name] = _compose_axes(name, before.tensors.get(name, {}), axes, _filters_per_group(step, name))
        attributes = {name: dict(values) for name, values in self.attributes.items()}
        for name, values in step.attributes.items():
            attributes[name] = {**attributes.get(name, {}), **values}
        layers = dict(self.layers)
        for name, kept in step.layers.items():
            layers[name] = _compose(layers[name], kept, f"layer {name}") if name in layers else kept
        return Plan(tensors=tensors, attributes=attributes, layers=layers, biases=before.biases)

    def to_json(self) -> dict[str, Any]:
        """The plan as values for `json.dumps`. `from_json` is the inverse."""
        return {
            "version": WITH_BIASES if self.biases else PLAN_VERSION,
            "tensors": {
                name: {str(axis): [list(part) for part in kept] for axis, kept in axes.items()}
                for name, axes in self.tensors.items()
            },
            "attributes": {
                name: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
                for name, values in self.attributes.items()
            },
            "layers": {name: list(kept) for name, kept in self.layers.items()},
            **({"biases": list(self.biases)} if self.biases else {}),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`. Raises PruningError for another version, an unknown or missing key, or values that
        are not indices.
        """
        wanted = {"version", "tensors", "attributes", "layers"}
        if not isinstance(data, Mapping) or set(data) - {"biases"} != wanted:
            keys = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise PruningError(f"not a plan: has {keys}, wanted the keys attributes, layers, tensors, version")
        if data["version"] not in (PLAN_VERSION, WITH_BIASES):
            raise PruningError(
                f"plan version {data['version']!r} cannot be read; this version of laasp_ray reads {PLAN_VERSION} and "
                f"{WITH_BIASES}"
            )
        for key in ("tensors", "attributes", "layers"):
            _want_mapping(data[key], f"plan.{key}")
        tensors = {name: _axes_from_json(axes, f"plan.tensors[{name!r}]") for name, axes in data["tensors"].items()}
        attributes = {
            name: _attributes_from_json(values, f"plan.attributes[{name!r}]")
            for name, values in data["attributes"].items()
        }
        layers = {name: _indices(kept, f"plan.layers[{name!r}]") for name, kept in data["layers"].items()}
        biases = data.get("biases", [])
        if not isinstance(biases, list) or not all(isinstance(name, str) for name in biases):
            raise PruningError(f"plan.biases is {biases!r}, must be a list of layers' names")
        return Plan(tensors=tensors, attributes=attributes, layers=layers, biases=tuple(biases))


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Prunes `model` in place. Parameters become new objects (same `requires_grad`, no `.grad`): make a new optimizer.

    Everything is checked before anything is changed, and the shapes are checked again afterwards. Raises PruningError
    naming the tensor and axis that do not fit, or the module whose attributes contradict its tensors.
    """
    modules = dict(model.named_modules())
    _add_biases(modules, plan.biases)
    selected = _selected(model, plan)
    for name, values in plan.attributes.items():
        for key in values:
            if name not in modules or not hasattr(modules[name], key):
                raise PruningError(f"the plan sets {name}.{key}, which this network does not have")
    made: dict[int, nn.Parameter] = {}  # one new parameter per new tensor, for all of its names
    for name, tensor in selected.items():
        _replace(model, name, tensor, made)
    for name, values in plan.attributes.items():
        for key, value in values.items():
            setattr(modules[name], key, value)
    touched = {name.rpartition(".")[0] for name in plan.tensors} | set(plan.attributes)
    for name in sorted(touched):
        _check_module(name, modules[name])


def _add_biases(modules: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    for name in names:
        layer = modules.get(name)
        if not isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
            raise PruningError(f"the plan gives {name} a bias, which is no convolution or linear layer of this network")
    for name in names:
        layer = modules[name]
        if layer.bias is None:
            weight = layer.get_parameter("weight")
            layer.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)


def macs_after(macs: Macs, plan: Plan) -> int:
    """Multiply-accumulates of the unpruned network after `plan`. `macs` was counted on the unpruned network.

    The multiply-accumulates of a layer are its number of weights times the number of positions that it is applied at.
    The positions do not change, so the shapes suffice.
    """
    return sum(_layer_after(macs, layer, plan)[0] for layer in macs.per_layer)


def pruned_macs(macs: Macs, plan: Plan) -> Macs:
    """The count of the unpruned network after `plan`, layer by layer, as `macs_after` derives it."""
    after = {layer: _layer_after(macs, layer, plan) for layer in macs.per_layer}
    return replace(
        macs,
        total=sum(count for count, _ in after.values()),
        per_layer={layer: count for layer, (count, _) in after.items()},
        weight_shapes={layer: shape for layer, (_, shape) in after.items()},
    )


def _layer_after(macs: Macs, layer: str, plan: Plan) -> tuple[int, tuple[int, ...]]:
    """A layer's multiply-accumulates and the shape of its weight after `plan`."""
    shape = list(macs.weight_shapes[layer])
    numerator, denominator = macs.per_layer[layer], 1
    for axis, kept in plan.tensors.get(f"{layer}.weight", {}).items():
        numerator, denominator = numerator * len(kept[0]), denominator * shape[axis]
        shape[axis] = len(kept[0])
    return numerator // denominator, tuple(shape)


def parameters_after(shapes: Mapping[str, tuple[int, ...]], plan: Plan) -> int:
    """The number of parameters after `plan`, for a network whose parameters have these `shapes` by name."""
    total = 0
    for name, shape in shapes.items():
        left = list(shape)
        for axis, kept in plan.tensors.get(name, {}).items():
            left[axis] = len(kept[0])
        total += math.prod(left)
    for layer in plan.biases:
        if f"{layer}.bias" not in shapes:
            rows = plan.tensors.get(f"{layer}.weight", {}).get(0)
            total += shapes[f"{layer}.weight"][0] if rows is None else len(rows[0])
    return total


def _filters_per_group(step: Plan, tensor: str) -> int:
    """The number of filters in each group after a depthwise step; 0 for another step."""
    values = step.attributes.get(tensor.rpartition(".")[0], {})
    groups, filters = values.get("groups"), values.get("out_channels")
    return filters // groups if isinstance(groups, int) and isinstance(filters, int) else 0


def _compose_axes(name: str, first: Mapping[int, Kept], second: Mapping[int, Kept], per_group: int) -> dict[int, Kept]:
    composed = dict(first)
    if per_group and len(first.get(1, ())) > 1:
        # A depthwise step removes whole groups of `per_group` rows each, so their column lists are removed too.
        composed[1] = tuple(first[1][row // per_group] for row in second[0][0][::per_group])
    for axis, after in second.items():
        before = composed.get(axis)
        if before is None:
            composed[axis] = after
            continue
        count = max(len(before), len(after))
        if any(len(parts) not in (1, count) for parts in (before, after)):
            raise PruningError(f"{name}, axis {axis}: {len(before)} groups cannot be followed by {len(after)}")
        composed[axis] = tuple(
            _compose(before[part % len(before)], after[part % len(after)], f"{name}, axis {axis}")
            for part in range(count)
        )
    return composed


def _compose(first: tuple[int, ...], second: tuple[int, ...], where: str) -> tuple[int, ...]:
    if second and second[-1] >= len(first):
        raise PruningError(f"{where}: the step keeps index {second[-1]}, but only {len(first)} are left before it")
    return tuple(first[index] for index in second)


def _select(name: str, tensor: torch.Tensor, axes: Mapping[int, Kept]) -> torch.Tensor:
    result = tensor.detach()
    for axis in sorted(axes):
        kept = axes[axis]
        if axis >= tensor.dim():
            raise PruningError(f"{name} has no axis {axis}, its shape is {tuple(tensor.shape)}")
        for part in kept:
            if not part or part[-1] >= tensor.shape[axis]:
                raise PruningError(
                    f"{name}, axis {axis}: the plan keeps index {part[-1] if part else 'none'}, but the "
                    f"tensor's shape is {tuple(tensor.shape)}"
                )
        if len(kept) == 1:
            result = result.index_select(axis, torch.tensor(kept[0], device=result.device))
            continue
        if axis != 1 or result.shape[0] % len(kept):
            raise PruningError(f"{name}, axis {axis}: {len(kept)} groups do not divide {result.shape[0]} rows")
        blocks = result.chunk(len(kept), dim=0)
        result = torch.cat(
            [
                block.index_select(1, torch.tensor(part, device=result.device))
                for block, part in zip(blocks, kept, strict=True)
            ]
        )
    return result


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(path), leaf
    except AttributeError as error:
        raise PruningError(f"the plan changes {name}, but this network has no module {path!r}") from error


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    module, leaf = _owner(model, name)
    parameter, buffer = module._parameters.get(leaf), module._buffers.get(leaf)
    tensor = buffer if parameter is None else parameter
    if tensor is None:
        raise PruningError(f"the plan changes {name}, but this network has no such parameter or buffer")
    return tensor


def _selected(model: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """The new tensors of the plan, by name. Names of the same tensor (tied weights) get the same new tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        names.setdefault(id(tensor), []).append(name)
    selected: dict[str, torch.Tensor] = {}
    for name, axes in plan.tensors.items():
        tensor = _tensor(model, name)
        for other in names.get(id(tensor), ()):
            if plan.tensors.get(other) != axes:
                raise PruningError(f"{name} and {other} are one tensor, but the plan does not cut both in the same way")
        known = next((selected[other] for other in names.get(id(tensor), ()) if other in selected), None)
        selected[name] = _select(name, tensor, axes) if known is None else known
    return selected


def _replace(model: nn.Module, name: str, tensor: torch.Tensor, made: dict[int, nn.Parameter]) -> None:
    module, leaf = _owner(model, name)
    old = module._parameters.get(leaf)
    if old is None:
        module._buffers[leaf] = tensor
    else:
        made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=old.requires_grad))
        module._parameters[leaf] = made[id(tensor)]


def _check_module(name: str, module: nn.Module) -> None:
    """Raises PruningError if a module's tensors do not have the shapes that its attributes imply."""
    wanted = expected_shapes(module)
    for leaf, shape in wanted.items():
        tensor = getattr(module, leaf, None)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise PruningError(
                f"after the plan {name}.{leaf} has shape {tuple(tensor.shape)}, but its module needs {shape}: {module}"
            )


def expected_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's tensors according to its attributes; empty for a module type without channels of its
    own.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        pair = (
            (module.in_channels, module.out_channels)
            if module.transposed
            else (module.out_channels, module.in_channels)
        )
        return {"weight": (pair[0], pair[1] // module.groups, *module.kernel_size), "bias": (module.out_channels,)}
    if isinstance(module, nn.Linear):
        return {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (module.num_features,))
    if isinstance(module, nn.LayerNorm):
        return dict.fromkeys(("weight", "bias"), tuple(module.normalized_shape))
    if isinstance(module, nn.GroupNorm):
        return dict.fromkeys(("weight", "bias"), (module.num_channels,))
    if isinstance(module, nn.PReLU):
        return {"weight": (module.num_parameters,)}
    return {}


def _want_mapping(value: Any, where: str) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise PruningError(f"{where} is {value!r:.80}, must be a mapping of names")


def _axes_from_json(value: Any, where: str) -> dict[int, Kept]:
    _want_mapping(value, where)
    axes: dict[int, Kept] = {}
    for axis, parts in value.items():
        if not axis.isdecimal() or not isinstance(parts, Sequence) or isinstance(parts, str) or not parts:
            raise PruningError(f"{where} has {axis!r}: {parts!r:.80}, must be an axis with lists of kept indices")
        axes[int(axis)] = tuple(_indices(part, f"{where}[{axis}]") for part in parts)
    return axes


def _attributes_from_json(value: Any, where: str) -> dict[str, AttributeValue]:
    _want_mapping(value, where)
    attributes: dict[str, AttributeValue] = {}
    for key, item in value.items():
        numbers = item if isinstance(item, list | tuple) else [item]
        if not numbers or not all(type(number) is int and number >= 1 for number in numbers):
            raise PruningError(f"{where}[{key!r}] is {item!r:.80}, must be a positive integer or a list of them")
        attributes[key] = tuple(numbers) if isinstance(item, list | tuple) else item
    return attributes


def _indices(value: Any, where: str) -> tuple[int, ...]:
    indices = tuple(value) if isinstance(value, list | tuple) else ()
    whole = all(type(index) is int and index >= 0 for index in indices)
    if not indices or not whole or any(later <= earlier for earlier, later in itertools.pairwise(indices)):
        raise PruningError(f"{where} is {value!r:.80}, must be a list of rising indices, at least one")
    return indices
