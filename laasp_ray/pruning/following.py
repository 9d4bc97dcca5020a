"""The graph of a pruned network from the graph of the network before, without running it.

A prune removes whole classes of coupled channels. If the network runs the same operations afterwards, what is left is
coupled as before, and only the channels' numbers change. In all other cases there is no answer, and the graph must be
made anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from laasp_ray.errors import PruningError
from laasp_ray.pruning.channels import ChannelAxis, plan_of, unite
from laasp_ray.pruning.coupling import Coupling
from laasp_ray.pruning.graph import PruningGraph, groups_of
from laasp_ray.pruning.plan import Plan
from laasp_ray.pruning.structure import structure_of

logger = logging.getLogger(__name__)

Removed = Mapping[ChannelAxis, set[int]]


class GraphMemory:
    """The last graph of a network that is pruned step by step. `made` counts the graphs that were made anew."""

    def __init__(self) -> None:
        self.made = 0
        self._last: tuple[PruningGraph, Plan] | None = None

    def graph(self, model: nn.Module, plan: Plan, fresh: Callable[[], PruningGraph]) -> PruningGraph:
        """The graph of `model`, which is the unpruned network after `plan`: derived from the last one, or else
        `fresh()`.
        """
        found = None if self._last is None else followed(*self._last, model, plan)
        if found is None:
            logger.debug("the network's graph is made anew")
            found, self.made = fresh(), self.made + 1
        self._last = found, plan
        return found


def followed(graph: PruningGraph, before: Plan, model: nn.Module, after: Plan) -> PruningGraph | None:
    """The graph of `model`, from `graph`. Both networks come from one unpruned network, by `before` and by `after`.

    None if it cannot be derived: more than prunable layers' filters is gone, an axis is left with one channel (of a
    group), a layer that could not be pruned has changed, or the network runs other operations than before.
    """
    if graph.structure is None:
        return None
    if before == after:
        return graph if _has_shapes(model, graph, {}) else None
    removed = _removed(graph, before, after)
    if removed is None:
        return None
    resized = {side: replace(side, size=side.size - len(channels)) for side, channels in removed.items()}
    if any(side.size <= side.blocks for side in resized.values()) or not _has_shapes(model, graph, removed):
        return None
    couplings = {name: _coupling(name, coupling, removed, resized) for name, coupling in graph.couplings.items()}
    if any(len(coupling.own) <= coupling.blocks for coupling in couplings.values()):
        return None
    if structure_of(model) != graph.structure:
        return None
    return graph.replaced(
        couplings=couplings,
        layers=groups_of(couplings, model),
        shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
    )


def _removed(graph: PruningGraph, before: Plan, after: Plan) -> Removed | None:
    """What was removed between two plans, as the graph knows it. None if that is not all of it."""
    total: dict[ChannelAxis, set[int]] = {}
    for layer, kept in after.layers.items():
        group = graph.layers.get(layer)
        had = before.layers.get(layer, range(group.filters) if group is not None else ())
        if len(kept) == len(had):
            continue
        if group is None:
            return None
        left = set(kept)
        try:
            unite(total, graph.removal(layer, [index for index, filter in enumerate(had) if filter not in left]))
        except PruningError:
            return None
    total = {side: channels for side, channels in total.items() if channels}
    try:
        return total if before.then(plan_of(total)) == after else None
    except PruningError:
        return None


def _has_shapes(model: nn.Module, graph: PruningGraph, removed: Removed) -> bool:
    """Whether `model` has the parameters of the network before, without what was removed."""
    wanted = {name: list(shape) for name, shape in graph.shapes.items()}
    for name, axes in plan_of(removed).tensors.items():
        for axis, kept in axes.items():
            if name in wanted:
                wanted[name][axis] = len(kept[0])
    return wanted == {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def _coupling(layer: str, coupling: Coupling, removed: Removed, resized: Mapping[ChannelAxis, ChannelAxis]) -> Coupling:
    """The coupling of a layer after `removed`: with the filters and channels that are left, numbered anew."""
    if removed.keys().isdisjoint(coupling.sides):
        return coupling
    own = next(side for side in coupling.sides if side.module == layer and side.role == "filters")
    left = [index for index in range(len(coupling.own)) if index not in removed.get(own, ())]
    found: list[tuple[int, int, ChannelAxis, dict[int, tuple[int, ...]]]] = []
    for (side, channels), place in zip(coupling.sides.items(), coupling.places, strict=True):
        numbers = _numbers(side, removed.get(side, set()))
        kept = {
            index: tuple(numbers[channel] for channel in channels[old])
            for index, old in enumerate(left)
            if old in channels
        }
        if kept:
            found.append((next(iter(kept)), place, resized.get(side, side), kept))
    found.sort(key=lambda entry: entry[:2])
    sides = {side: kept for _, _, side, kept in found}
    return Coupling(sides, coupling.blocks, coupling.own[left], tuple(place for _, place, _, _ in found))


def _numbers(side: ChannelAxis, removed: set[int]) -> dict[int, int]:
    """Channel before -> channel after."""
    return {
        channel: number for number, channel in enumerate(index for index in range(side.size) if index not in removed)
    }
