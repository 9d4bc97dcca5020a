"""What has to be pruned together, and how much of it at a time.

torch-pruning's dependency graph says which channels of which modules belong together. Its groups are translated here
into our own plans; its own pruning is not used, for it gives every group of a grouped convolution the inputs kept in
the first.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch_pruning
from torch import nn
from torch_pruning import ops

from laasp_ray.config import StepRule
from laasp_ray.cost.macs import Macs
from laasp_ray.errors import PruningError
from laasp_ray.pruning.channels import Side, describe, is_depthwise, parameter_side, plan_of, unite
from laasp_ray.pruning.names import candidate_layers, ignored_modules
from laasp_ray.pruning.plan import Plan, macs_after, parameters_after
from laasp_ray.pruning.verify import fault_of, scramble, tensors_in, twin

logger = logging.getLogger(__name__)

_TRANSPARENT = (ops.OPTYPE.ELEMENTWISE, ops.OPTYPE.CONCAT, ops.OPTYPE.RESHAPE)
"""Operations that channels pass through; splits and slices, whose sizes a network fixes, are not among them."""


@dataclass(frozen=True)
class ChannelGroup:
    """A prunable layer. Its `filters` fall in `blocks` equal contiguous blocks that must lose the same count each;
    `coupled` names the modules that change with it, itself included, in the order of named_modules."""

    layer: str
    filters: int
    blocks: int
    coupled: tuple[str, ...]


@dataclass(frozen=True)
class _Coupling:
    """For every side that a layer's filters reach: filter -> channels there."""

    sides: Mapping[Side, Mapping[int, tuple[int, ...]]]
    blocks: int

    def removal(self, filters: Sequence[int]) -> dict[Side, set[int]]:
        return {
            side: {channel for index in filters for channel in channels.get(index, ())}
            for side, channels in self.sides.items()
        }


class PruningGraph:
    """The prunable layers of a network as it stands now, and what goes with each of their filters.

    Candidates are the convolutions and the linear layers of `extra_layers`. `ignored` names modules (with all below
    them) or prefixes ending in a dot: they keep their own filters and channels, so a layer whose prune would take any
    of those is skipped; an ignored layer may still lose inputs. Works on a copy; the network is left alone, is not
    kept, and may be in any mode. `example_input` of shape (B, ...) is any input it takes; its values do not matter.

    Every layer's coupling is checked by running (see verify.py); one that fails is skipped. `layers` and `skipped`
    are in the order of named_modules. `shapes` has those of all parameters, by name.

    Raises ConfigError for unknown names, PruningError if the network cannot be traced. (Method: Fang et al., DepGraph,
    CVPR 2023.)
    """

    layers: Mapping[str, ChannelGroup]
    skipped: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __init__(
        self,
        model: nn.Module,
        example_input: torch.Tensor,
        *,
        ignored: Sequence[str] = (),
        extra_layers: Sequence[str] = (),
    ) -> None:
        probe = twin(model).cpu().float().eval()
        example = example_input[:1].detach().cpu().clone()
        if example.is_floating_point():
            example = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
        self.shapes = {name: tuple(parameter.shape) for name, parameter in probe.named_parameters()}
        modules = dict(probe.named_modules())
        frozen = ignored_modules(list(modules), ignored)
        names = candidate_layers(modules, extra_layers)
        tracer = _Tracer(probe, example, frozen)
        self._couplings: dict[str, _Coupling] = {}
        reasons: dict[str, str] = {}
        for name in names:
            found = "is ignored" if name in frozen else tracer.coupling(name)
            if isinstance(found, str):
                reasons[name] = found
            else:
                self._couplings[name] = found
        scramble(probe, example)
        for name, fault in _faults(probe, example, self._couplings).items():
            reasons[name] = fault
            del self._couplings[name]
        order = {name: position for position, name in enumerate(modules)}
        self.layers = {name: _group(name, coupling, order) for name, coupling in self._couplings.items()}
        self.skipped = {name: reasons[name] for name in names if name in reasons}
        for name, reason in self.skipped.items():
            logger.debug("layer %s is not pruned: %s", name, reason)

    def step(self, layer: str, filters: Sequence[int]) -> Plan:
        """The plan that removes these filters of `layer`, and all that is coupled to them, from this network.

        Raises PruningError for a layer that is not in `layers`, and for filters that are out of range, repeated, all
        there are, or not the same count in each of the layer's blocks.
        """
        return plan_of(self.removal(layer, filters))

    def removal(self, layer: str, filters: Sequence[int]) -> dict[Side, set[int]]:
        """The channels that `step` removes, at every side that it changes; raises as `step` does."""
        if layer not in self.layers:
            raise PruningError(f"layer {layer!r} cannot be pruned: {self.skipped.get(layer, 'no such candidate')}")
        group = self.layers[layer]
        wrong = [index for index in filters if not 0 <= index < group.filters]
        if wrong or len(set(filters)) != len(filters):
            raise PruningError(
                f"filters {wrong or list(filters)} of {layer}: must be different and from 0 to {group.filters - 1}"
            )
        width = group.filters // group.blocks
        counts = {sum(index // width == block for index in filters) for block in range(group.blocks)}
        if len(counts) > 1:
            raise PruningError(
                f"filters {list(filters)} of {layer}: each of its {group.blocks} blocks of {width} must "
                f"lose the same count, not {sorted(counts)}"
            )
        if len(filters) == group.filters:
            raise PruningError(f"all {group.filters} filters of {layer} would go; at least one must stay")
        return self._couplings[layer].removal(filters)


class _Tracer:
    """torch-pruning's graph of a network, asked for one layer after the other."""

    def __init__(self, probe: nn.Module, example: torch.Tensor, frozen: set[str]) -> None:
        """`probe` is a copy that may be changed: the graph is shown its grouped convolutions as plain ones."""
        self._frozen = frozen
        self._modules = dict(probe.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        self._parameters = {parameter: name for name, parameter in probe.named_parameters()}
        self._sides = {
            (name, inputs): describe(name, module, inputs=inputs)
            for name, module in self._modules.items()
            for inputs in (False, True)
        }
        self._outputs: set[object] = set()
        grouped = {
            module: module.groups
            for module in self._modules.values()
            if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and not is_depthwise(module)
        }

        def after_forward(output: object) -> object:
            self._outputs.update(tensor.grad_fn for tensor in tensors_in(output))
            for convolution in grouped:
                convolution.groups = 1  # or one with a filter a group would be taken for a depthwise one
            return list(tensors_in(output))

        probe.requires_grad_(True)
        self._graph = torch_pruning.DependencyGraph()
        try:
            self._graph.build_dependency(
                probe,
                example,
                forward_fn=lambda network, inputs: network(inputs),
                output_transform=after_forward,
                verbose=False,
            )
        except Exception as error:  # tracing runs the network's own code and can fail in any way
            raise PruningError(
                f"the network cannot be traced with an input of shape {tuple(example.shape)} "
                f"({type(error).__name__}: {error})"
            ) from error
        for convolution, groups in grouped.items():
            convolution.groups = groups
        for parameter in probe.parameters():
            parameter.grad = None

    def coupling(self, layer: str) -> _Coupling | str:
        """What the layer's filters reach, or why they cannot be removed."""
        own = self._sides[layer, False]
        if not isinstance(own, Side):
            return own or "has no filters"
        if self._modules[layer] not in self._graph.module2node:
            return "is not part of the forward pass"
        reached = self._reached(layer, range(own.size))
        if isinstance(reached, str):
            return reached
        # A filter that reaches others of its own layer shows when only half of them are asked for.
        half = random.Random(0).sample(range(own.size), own.size // 2)
        again = self._reached(layer, half)
        chosen = set(half)
        for side, pairs in reached.items():
            expected = {channel for channel, root in pairs.items() if root in chosen}
            if half and (isinstance(again, str) or set(again.get(side, {})) != expected):
                return "its filters are coupled to one another"
        return _with_blocks(own, {side: _by_root(pairs) for side, pairs in reached.items()})

    def _reached(self, layer: str, filters: Sequence[int]) -> dict[Side, dict[int, int]] | str:
        """Side -> channel there -> the filter it belongs to; or why that cannot be."""
        module = self._modules[layer]
        prune = self._graph.get_pruner_of_module(module).prune_out_channels
        reached: dict[Side, dict[int, int]] = {}
        for item in self._graph.get_pruning_group(module, prune, list(filters)).items:
            side = self._side(item.dep)
            if isinstance(side, str):
                return side
            if side is None:
                continue
            if item.idxs and not 0 <= min(item.idxs) <= max(item.idxs) < side.size:
                return f"its filters do not match the {side.size} {side.role} of {side.module}"
            reached.setdefault(side, {}).update(zip(item.idxs, item.root_idxs, strict=True))
        return reached

    def _side(self, dependency: torch_pruning.Dependency) -> Side | str | None:
        """The side that a dependency of the graph acts on; None where channels only pass through."""
        node, module = dependency.target, dependency.target.module
        name = self._names.get(module)
        inputs = isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and not self._graph.is_out_channel_pruning_fn(
            dependency.handler
        )
        if node.type == ops.OPTYPE.OUTPUT or (node.grad_fn in self._outputs and not inputs):
            return "its filters are outputs of the network"
        if node.type == ops.OPTYPE.PARAMETER:
            parameter = self._parameters[module]
            if parameter.rpartition(".")[0] in self._frozen:
                return f"is coupled to {parameter}, which is ignored"
            return parameter_side(parameter, node.pruning_dim, module.shape[node.pruning_dim])
        if name is None:
            return None if node.type in _TRANSPARENT else f"its channels pass through a {node.type.name.lower()}"
        if name in self._frozen and not inputs:
            return f"is coupled to {name}, which is ignored"
        return self._sides[name, inputs]


def _by_root(pairs: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    channels: dict[int, list[int]] = {}
    for channel in sorted(pairs):
        channels.setdefault(pairs[channel], []).append(channel)
    return {root: tuple(found) for root, found in channels.items()}


def _with_blocks(own: Side, sides: dict[Side, dict[int, tuple[int, ...]]]) -> _Coupling | str:
    blocks = 1
    for side, channels in sides.items():
        if side.blocks == 1:
            continue
        if side.size != own.size or any(channels.get(index) != (index,) for index in range(own.size)):
            return f"its filters are only a part of the {side.role} of {side.module}, which has {side.blocks} groups"
        blocks = math.lcm(blocks, side.blocks)
    if own.size % blocks:
        return f"its {own.size} filters do not divide into the {blocks} blocks that the grouped layers around it need"
    if own.size == blocks:
        return "one filter left" if blocks == 1 else f"one filter left in each of its {blocks} blocks"
    return _Coupling(sides, blocks)


def _group(name: str, coupling: _Coupling, order: Mapping[str, int]) -> ChannelGroup:
    coupled = sorted({side.module for side in coupling.sides}, key=lambda module: order[module])
    own = next(side.size for side in coupling.sides if side.module == name and side.role == "filters")
    return ChannelGroup(name, own, coupling.blocks, tuple(coupled))


def _faults(probe: nn.Module, example: torch.Tensor, couplings: Mapping[str, _Coupling]) -> dict[str, str]:
    """Layers whose removal does not do what it should, with the fault. All are tried at once, and singly if that fails.

    Those that meet a module which normalises over channels are tried apart, for less can be asked of them.
    """
    found: dict[str, str] = {}
    for normalised in (False, True):
        layers = [
            name
            for name, coupling in couplings.items()
            if any(side.normalises for side in coupling.sides) == normalised
        ]
        together: dict[Side, set[int]] = {}
        for name in layers:
            coupling = couplings[name]
            if not any(side.module == name and side.role == "filters" for side in together):
                unite(together, coupling.removal(_random_half(name, coupling)))
        if together and fault_of(probe, example, together) is not None:
            singly = (
                (name, fault_of(probe, example, couplings[name].removal(_random_half(name, couplings[name]))))
                for name in layers
            )
            found.update((name, fault) for name, fault in singly if fault is not None)
    return found


def _random_half(name: str, coupling: _Coupling) -> list[int]:
    own = next(side.size for side in coupling.sides if side.module == name and side.role == "filters")
    width, draw = own // coupling.blocks, random.Random(name)
    return [
        block * width + index
        for block in range(coupling.blocks)
        for index in sorted(draw.sample(range(width), max(1, width // 2)))
    ]


def step_sizes(graph: PruningGraph, macs: Macs, *, step: float, step_rule: StepRule) -> dict[str, int]:
    """Layer -> how many filters one prune takes, computed once, on the unpruned network that `macs` was counted on.

    `flops_share`: as many as are worth `step` of all multiply-accumulates (Ghimire et al. 2023). With d the share
    that goes with one filter, or with one from each of the layer's blocks, max(1, floor(step / d + 0.5)) times the
    number of blocks. `layer_share`: the same rounding, with d one over the layer's filters in a block.
    """
    sizes = {}
    for name, group in graph.layers.items():
        width = group.filters // group.blocks
        whole = float(width)  # how many filters of a block the whole, of which `step` is a share, is worth
        if step_rule == "flops_share":
            gone = macs.total - macs_after(macs, graph.step(name, range(0, group.filters, width)))
            whole = macs.total / gone if gone else 0.0
        sizes[name] = group.blocks * max(1, math.floor(step * whole + 0.5))
    return sizes


def filters_to_remove(
    group: ChannelGroup,
    *,
    step_size: int,
    original: int,
    step_rule: StepRule,
    step: float,
    max_pruned: float,
    round_to: int = 1,
) -> int:
    """How many filters the layer may lose this turn; 0 if none.

    `original` is its number of filters in the unpruned network, of which at most the share `max_pruned` is ever
    removed. `step_size` is what `step_sizes` gave; under the rule `layer_share` the count is the share `step` of the
    filters that the layer has now instead. A multiple of the layer's blocks that leaves a multiple of `round_to`: the
    nearest one, of two equally near the smaller; one filter of each block stays.
    """
    wanted = step_size
    if step_rule == "layer_share":
        wanted = group.blocks * max(1, math.floor(step * group.filters / group.blocks + 0.5))
    wanted -= wanted % group.blocks
    most = _limit(original, max_pruned) - (original - group.filters)
    unit = math.lcm(group.blocks, round_to)
    allowed = [group.filters - kept for kept in range(unit, group.filters, unit) if group.filters - kept <= most]
    return min(allowed, key=lambda count: (abs(count - wanted), count), default=0) if wanted else 0


def reachable(
    graph: PruningGraph, macs: Macs, *, max_pruned: float, layers: Collection[str] | None = None, round_to: int = 1
) -> float:
    """The share of multiply-accumulates that is gone when `layers` (default: all) of the unpruned network are at their
    limit, which leaves each a multiple of `round_to` filters."""
    return 1 - macs_after(macs, _at_limits(graph, max_pruned, layers, round_to)) / macs.total


def reachable_parameters(
    graph: PruningGraph, *, max_pruned: float, layers: Collection[str] | None = None, round_to: int = 1
) -> float:
    """The same for the share of parameters."""
    left = parameters_after(graph.shapes, _at_limits(graph, max_pruned, layers, round_to))
    return 1 - left / parameters_after(graph.shapes, Plan.empty())


def _at_limits(graph: PruningGraph, max_pruned: float, layers: Collection[str] | None, round_to: int) -> Plan:
    total: dict[Side, set[int]] = {}
    for name in graph.layers if layers is None else layers:
        group = graph.layers[name]
        width = group.filters // group.blocks
        own = next((gone for side, gone in total.items() if side.module == name and side.role == "filters"), set())
        unit = math.lcm(group.blocks, round_to)
        least = max(unit, math.ceil((group.filters - _limit(group.filters, max_pruned)) / unit) * unit)
        wanted = max(0, group.filters - least) // group.blocks
        filters = [index for index in range(group.filters) if index % width < wanted and index not in own]
        if filters and len(own) < wanted * group.blocks:
            unite(total, graph.removal(name, filters))
    return plan_of(total)


def _limit(original: int, max_pruned: float) -> int:
    """Most filters that may go; the margin keeps 0.29 of 100 at 29 in floating point."""
    return math.floor(max_pruned * original + 1e-9)
