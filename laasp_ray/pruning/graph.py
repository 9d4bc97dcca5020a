"""The channels that must be pruned together, and how many of them one prune removes."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from laasp_ray.config import StepRule
from laasp_ray.cost.macs import Macs
from laasp_ray.errors import PruningError
from laasp_ray.pruning.channels import CannotPrune, ChannelAxis, plan_of, unite
from laasp_ray.pruning.coupling import Coupling, Couplings
from laasp_ray.pruning.faults import check_repeatable, faults_of, retried
from laasp_ray.pruning.heads import head_couplings
from laasp_ray.pruning.names import candidate_layers, ignored_modules
from laasp_ray.pruning.plan import Plan, macs_after, parameters_after
from laasp_ray.pruning.structure import Structure, structure_of
from laasp_ray.pruning.verify import clone_sharing_parameters, scramble

logger = logging.getLogger(__name__)

_MOST_IN_FLOAT64 = 50_000_000
"""Networks with more parameters are checked in float32, which needs half the memory and is less exact."""


@dataclass(frozen=True)
class ChannelGroup:
    """A prunable layer.

    Its `filters` are in `blocks` equal contiguous blocks that must lose the same number each. `coupled` names the
    modules that change with it, including itself, in the order of named_modules. `heads`: the rows of each head, for a
    layer that loses whole attention heads only; these are its filters then.
    """

    layer: str
    filters: int
    blocks: int
    coupled: tuple[str, ...]
    heads: tuple[tuple[int, ...], ...] = ()

    def of_filters(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores (N,) of the filters, from those of the layer's rows: a head's is the mean of its rows'."""
        if not self.heads or len(scores) == self.filters:
            return scores
        return torch.stack([scores[list(rows)].mean() for rows in self.heads])


class PruningGraph:
    """The prunable layers of the current network, and the channels that are coupled to each of their filters.

    Candidates are the convolutions and the linear layers of `extra_layers`. `ignored` names modules (with all their
    submodules) or prefixes ending in a dot. They keep their own filters and channels, so a layer whose prune would
    remove some of these is skipped. An ignored layer may still lose inputs. The graph works on a copy and does not
    change or keep the network, which may be in any mode. `example_input` of shape (B, ...) is any valid input; its
    values do not matter.

    Every layer's coupling is checked by a run (see verify.py), and a layer that fails is skipped. `layers` and
    `skipped` are in the order of named_modules. `shapes` has the shapes of all parameters by name. `structure` is that
    of the forward pass if the graph of a pruned network can be derived from this one (following.py), else None.

    Raises ConfigError for unknown names, PruningError if the network cannot be run.
    """

    layers: Mapping[str, ChannelGroup]
    skipped: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    couplings: Mapping[str, Coupling]
    structure: Structure | None

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        example_input: torch.Tensor,
        *,
        ignored: Sequence[str] = (),
        extra_layers: Sequence[str] = (),
    ) -> None:
        _check_kind(model)
        probe = clone_sharing_parameters(model).cpu().float().eval()
        exact = sum(parameter.numel() for parameter in probe.parameters()) <= _MOST_IN_FLOAT64
        if exact:
            probe.double()
        example = example_input[:1].detach().cpu().clone()
        if example.is_floating_point():
            example = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
            example = example.double() if exact else example
        self.shapes = {name: tuple(parameter.shape) for name, parameter in probe.named_parameters()}
        modules = dict(probe.named_modules())
        frozen = ignored_modules(list(modules), ignored)
        names = candidate_layers(modules, extra_layers)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # hooks turn it off, and all runs must use the same operations
        try:
            self._look(probe, example, frozen, names)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def _look(self, probe: nn.Module, example: torch.Tensor, frozen: set[str], names: Sequence[str]) -> None:
        flow = retried(lambda: Couplings(probe, example, frozen))
        retried(lambda: check_repeatable(probe, example, flow.outputs))
        self.couplings = couplings = dict[str, Coupling]()
        reasons: dict[str, str] = {}
        for name in names:
            found = CannotPrune("is ignored") if name in frozen else flow.of(name)
            if isinstance(found, CannotPrune):
                reasons[name] = found.reason
            else:
                couplings[name] = found
        scramble(probe, example)
        faults = faults_of(probe, example, flow, couplings)
        for name, fault in faults.items():
            reasons[name] = fault
            del couplings[name]
        attentive = {name for name in reasons if name not in frozen}
        found_heads, without = head_couplings(probe, example, attentive, int(flow.classes.max()) + 1)
        couplings |= found_heads
        reasons = {name: without.get(name, reason) for name, reason in reasons.items() if name not in found_heads}
        self.couplings = couplings = {name: couplings[name] for name in names if name in couplings}
        self.layers = groups_of(couplings, probe)
        self.skipped = {name: reasons[name] for name in names if name in reasons}
        for name, reason in self.skipped.items():
            logger.debug("layer %s is not pruned: %s", name, reason)
        # Whether a part of a cut line, or a layer with a fault, can be pruned depends on sizes.
        follows = flow.has_distinct_sides and not flow.cut and not faults and not found_heads
        self.structure = structure_of(probe) if follows else None

    def replaced(
        self,
        *,
        couplings: Mapping[str, Coupling],
        layers: Mapping[str, ChannelGroup],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> PruningGraph:
        """This graph for a network of the same structure, with other channels. Nothing is checked."""
        graph = copy.copy(self)
        graph.couplings, graph.layers, graph.shapes = couplings, layers, shapes
        return graph

    def step(self, layer: str, filters: Sequence[int]) -> Plan:
        """The plan that removes these filters of `layer`, and all that is coupled to them, from this network.

        Raises PruningError for a layer that is not in `layers`, and for filters that are out of range, repeated, all of
        the layer's, or not the same number in each of its blocks.
        """
        return plan_of(self.removal(layer, filters))

    def removal(self, layer: str, filters: Sequence[int]) -> dict[ChannelAxis, set[int]]:
        """Side -> the channels that `step` removes. Raises the errors of `step`."""
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
        return self.couplings[layer].removal(filters)


def groups_of(couplings: Mapping[str, Coupling], model: nn.Module) -> dict[str, ChannelGroup]:
    """The groups of layers with these couplings in `model`."""
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    return {name: _group(name, coupling, order) for name, coupling in couplings.items()}


def _group(name: str, coupling: Coupling, order: Mapping[str, int]) -> ChannelGroup:
    coupled = sorted({side.module for side in coupling.sides}, key=lambda module: order[module])
    rows = next(rows for side, rows in coupling.sides.items() if side.module == name and side.role == "filters")
    heads = tuple(rows.values()) if any(len(of_head) > 1 for of_head in rows.values()) else ()
    return ChannelGroup(name, len(coupling.own), coupling.blocks, tuple(coupled), heads)


def _check_kind(model: nn.Module) -> None:
    """Raises PruningError for modules that cannot be copied or traced."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise PruningError(
                f"module {name or 'the network'} is TorchScript: give the nn.Module that it was made from"
            )
        if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise PruningError(f"module {name or 'the network'} has no weights yet (lazy): run the network once first")


def step_sizes(graph: PruningGraph, macs: Macs, *, step: float, step_rule: StepRule) -> dict[str, int]:
    """Layer -> the number of filters that one prune removes. Computed once, on the unpruned network of `macs`.

    `flops_share`: as many as are worth `step` of all multiply-accumulates (Ghimire et al. 2023). With d the share of
    one filter, or of one from each of the layer's blocks, it is max(1, floor(step / d + 0.5)) times the number of
    blocks. `layer_share`: the same rounding, with d = 1 / (the layer's filters in a block).
    """
    sizes = {}
    for name, group in graph.layers.items():
        width = group.filters // group.blocks
        whole = float(width)  # filters of a block that are worth the whole; `step` is a share of it
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
    """The number of filters that the layer may lose in this iteration; 0 if none.

    `original` is its number of filters in the unpruned network; at most the share `max_pruned` of it is ever removed.
    `step_size` is from `step_sizes`. Under the rule `layer_share` the share `step` of the layer's current filters is
    used instead. The result is a multiple of the layer's blocks and leaves a multiple of `round_to`. It is the nearest
    such number; of two equally near ones the smaller. One filter of each block stays.
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
    """The reduction of multiply-accumulates when `layers` (default: all) of the unpruned network are pruned to their
    limit.

    The limit leaves each layer a multiple of `round_to` filters.
    """
    return 1 - macs_after(macs, _at_limits(graph, max_pruned, layers, round_to)) / macs.total


def reachable_parameters(
    graph: PruningGraph, *, max_pruned: float, layers: Collection[str] | None = None, round_to: int = 1
) -> float:
    """As `reachable`, for the reduction of parameters."""
    left = parameters_after(graph.shapes, _at_limits(graph, max_pruned, layers, round_to))
    return 1 - left / parameters_after(graph.shapes, Plan.empty())


def _at_limits(graph: PruningGraph, max_pruned: float, layers: Collection[str] | None, round_to: int) -> Plan:
    total: dict[ChannelAxis, set[int]] = {}
    for name in graph.layers if layers is None else layers:
        group = graph.layers[name]
        width = group.filters // group.blocks
        own = next((gone for side, gone in total.items() if side.module == name and side.role == "filters"), set())
        unit = math.lcm(group.blocks, round_to)
        least = max(unit, math.ceil((group.filters - _limit(group.filters, max_pruned)) / unit) * unit)
        wanted = max(0, group.filters - least) // group.blocks
        filters = [index for index in range(group.filters) if index % width < wanted and index not in own]
        if filters and len(own) < wanted * group.blocks:
            unite(total, graph.removal(name, _leaving_some(graph, group, filters, total)))
    return plan_of(total)


def _leaving_some(
    graph: PruningGraph, group: ChannelGroup, filters: Sequence[int], total: Mapping[ChannelAxis, set[int]]
) -> list[int]:
    """The filters of these that can be removed so that every other layer keeps some. Blocks lose the same positions."""

    def fits(chosen: Sequence[int]) -> bool:
        removal = graph.removal(group.layer, chosen)
        return all(len(total.get(side, set()) | gone) < side.size for side, gone in removal.items())

    if fits(filters):
        return list(filters)
    width, chosen = group.filters // group.blocks, list[int]()
    for place in sorted({index % width for index in filters}):
        row = [index for index in filters if index % width == place]
        if fits([*chosen, *row]):
            chosen += row
    return chosen


def _limit(original: int, max_pruned: float) -> int:
    """The largest number of filters that may be removed. The margin keeps 0.29 of 100 at 29 in floating point."""
    return math.floor(max_pruned * original + 1e-9)
