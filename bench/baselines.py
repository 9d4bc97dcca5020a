"""What LAASP is compared with in bench/methods.py: other ways to choose what goes, each a turn of the same worth.

A turn is a `laasp_ray.methods.TakeTurn`. Each keeps within `prune.max_pruned`, and is worth about `prune.step` of the
unpruned network's multiply-accumulates, or a layer's step where a turn prunes one layer.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from torch import nn

from laasp_ray import criteria
from laasp_ray.config import PruneConfig
from laasp_ray.cost.macs import Macs, count_macs
from laasp_ray.data.sampling import derive_seed
from laasp_ray.errors import ExhaustedError, SearchError
from laasp_ray.methods import TakeTurn, pls
from laasp_ray.methods.turn import OnCandidate, Stopwatch, Turn
from laasp_ray.pruning.channels import plan_of
from laasp_ray.pruning.groups import ChannelGroup, PruningGraph, filters_to_remove
from laasp_ray.pruning.masks import mask_of
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.plan import Plan, macs_after
from laasp_ray.pruning.several import independent_layers, removal_of_several
from laasp_ray.records import Decision, LayerPrune, Ranking
from laasp_ray.search.activations import Wanted
from laasp_ray.search.candidates import Baseline
from laasp_ray.search.evaluate import LossTask, MeasuredLoss
from laasp_ray.search.executor import Executor
from laasp_ray.search.schedule import OnResult, OnShare

Option = TypeVar("Option")
Picks = Mapping[str, tuple[int, ...]]
"""Layer -> the filters that go, rising."""


@dataclass(frozen=True)
class Room:
    """A layer as it stands: its filters, how many it had in the unpruned network, and how many of them may go now."""

    filters: int
    original: int
    blocks: int
    allowed: int


@dataclass(frozen=True)
class Standing:
    """The network of a turn, `model` being `network` rebuilt, with what the methods here ask of it."""

    model: nn.Module
    network: NetworkState
    example_input: torch.Tensor
    graph: PruningGraph
    macs: Macs
    baseline: Baseline
    config: PruneConfig
    executor: Executor
    turn: int
    clock: Stopwatch

    def room(self, layer: str) -> Room:
        group = self.graph.layers[layer]
        original = self.baseline.filters.get(layer, group.filters)
        return Room(group.filters, original, group.blocks, self._removable(group, group.filters))

    def step_of(self, layer: str) -> int:
        """How many filters LAASP would take of the layer; 0 if it is at its limit."""
        return self._removable(self.graph.layers[layer], self.baseline.step_sizes.get(layer, 1))

    def worth(self, picks: Picks) -> float:
        """The share of the unpruned network's multiply-accumulates that goes with these filters."""
        left = macs_after(self.macs, plan_of(removal_of_several(self.graph, picks)))
        return (self.macs.total - left) / self.baseline.macs.total

    def carry_out(self, picks: Picks, criterion: str) -> Turn:
        """The turn that removes these filters. Its losses tell what that costs; they do not enter into the choice."""
        removal = removal_of_several(self.graph, picks)
        step = plan_of(removal)
        tasks = [LossTask(f"the prune by {criterion}", step, mask_of(removal)), LossTask("before", Plan.empty(), {})]
        network = self.executor.for_scoring(self.network)
        after, before = self.executor.measure(network, tasks, _hear_nothing, _hear_nothing)
        if after.error:
            raise SearchError(f"the network that {criterion} leaves cannot be evaluated: {after.error}")
        self.clock.lap("evaluate")
        first, *further = [
            LayerPrune(layer=layer, criterion=criterion, filters=filters) for layer, filters in picks.items()
        ]
        decision = Decision(
            turn=self.turn,
            layer=first.layer,
            criterion=first.criterion,
            filters=first.filters,
            loss=after.loss,
            loss_before=before.loss,
            flops_reduction=1 - macs_after(self.macs, step) / self.baseline.macs.total,
            further=tuple(further),
        )
        return Turn(decision, step, Ranking([]), self.clock.seconds)

    def _removable(self, group: ChannelGroup, step_size: int) -> int:
        return filters_to_remove(
            group,
            step_size=step_size,
            original=self.baseline.filters.get(group.layer, group.filters),
            step_rule="flops_share",
            step=self.config.step,
            max_pruned=self.config.max_pruned,
        )


def _turn(take: Callable[[Standing], Turn]) -> TakeTurn:
    """A method of what takes a turn of the network as it stands."""

    def take_turn(
        model: nn.Module,
        network: NetworkState,
        example_input: torch.Tensor,
        baseline: Baseline,
        config: PruneConfig,
        executor: Executor,
        *,
        turn: int,
        on_candidate: OnCandidate,
    ) -> Turn:
        clock = Stopwatch()
        graph = PruningGraph(model, example_input, ignored=config.ignored, extra_layers=config.extra_layers)
        macs = count_macs(model, example_input)
        clock.lap("graph")
        return take(Standing(model, network, example_input, graph, macs, baseline, config, executor, turn, clock))

    return take_turn


@_turn
def uniform_turn(now: Standing) -> Turn:
    """All layers lose the same share of their original filters, lowest l1 first, up to whole filters.

    So the filters go one after the other, each from the layer that has lost the least share. Of layers whose filters
    are coupled the first decides for all.
    """
    rooms = {layer: now.room(layer) for layer in deciding_layers(now.graph)}
    scores = {layer: criteria.scores("l1", now.model.get_submodule(layer)) for layer in rooms}

    def picks(counts: Mapping[str, int]) -> Picks:
        return {layer: criteria.lowest(scores[layer], count, rooms[layer].blocks) for layer, count in counts.items()}

    chosen = worth_about(map(picks, evenly(rooms)), now.worth, now.config.step)
    now.clock.lap("propose")
    return now.carry_out(chosen, "l1")


def random_turn(seed: int) -> TakeTurn:
    """The method of a run of `seed`: a random layer loses its step's number of random filters."""

    @_turn
    def take(now: Standing) -> Turn:
        rooms = {layer: now.room(layer) for layer in now.graph.layers}
        draw = random.Random(derive_seed(seed, f"random prune, turn {now.turn}"))
        layer, filters = random_pick(rooms, {name: now.step_of(name) for name in rooms}, draw)
        now.clock.lap("propose")
        return now.carry_out({layer: filters}, "random")

    return take


@_turn
def pls_turn(now: Standing) -> Turn:
    """The library's PLS, at the percentage that makes this turn worth most nearly `prune.step`.

    A layer at `prune.max_pruned` keeps what it has: its other filters' scores are infinite.
    """
    rooms = {layer: now.room(layer) for layer in independent_layers(now.graph)}
    network = now.executor.for_scoring(now.network)
    scores = within(now.executor.importance(network, Wanted.of(rooms, now.config)), rooms)
    blocks = {layer: room.blocks for layer, room in rooms.items()}
    filters = sum(room.filters for room in rooms.values())
    percentages = (100 * count / filters for count in range(1, 1 + sum(room.allowed for room in rooms.values())))
    percent = worth_about(percentages, lambda share: now.worth(pls.choose(scores, blocks, share)), now.config.step)
    now.clock.lap("score")
    taken = pls.take_turn(
        now.model,
        now.network,
        now.example_input,
        now.baseline,
        dataclasses.replace(now.config, percent=percent),
        _Scored(now.executor, network, scores),
        turn=now.turn,
        on_candidate=_hear_nothing,
    )
    before = now.clock.seconds
    spent = {name: before.get(name, 0.0) + seconds for name, seconds in taken.seconds.items()}
    return dataclasses.replace(taken, seconds=spent)


def worth_about(options: Iterable[Option], worth: Callable[[Option], float], step: float) -> Option:
    """Of options that take ever more, the one worth most nearly `step`; of two as near, the lesser.

    Looks no further than the first that is worth `step` or more. Raises ExhaustedError if there are no options.
    """
    best: tuple[float, Option] | None = None
    for option in options:
        value = worth(option)
        if best is None or abs(value - step) < best[0]:
            best = abs(value - step), option
        if value >= step:
            break
    if best is None:
        raise ExhaustedError("no layer has a filter left to give: raise prune.max_pruned or lower the target")
    return best[1]


def evenly(rooms: Mapping[str, Room]) -> Iterator[dict[str, int]]:
    """How many filters each layer loses, ever more: the next of the layer that has lost the least share.

    Shares are of the original filters, rounded as a share of them all would be: of a layer of 16 filters the first
    goes at 1/32, the second at 3/32. Of equal shares the earlier layer is next. A layer loses one of each block.
    """
    counts: dict[str, int] = {}

    def next_at(layer: str) -> Fraction:
        room = rooms[layer]
        lost = room.original - room.filters + counts.get(layer, 0)
        return Fraction(2 * lost + room.blocks, 2 * room.original)

    while open_layers := [layer for layer, room in rooms.items() if counts.get(layer, 0) < room.allowed]:
        layer = min(open_layers, key=next_at)
        counts[layer] = counts.get(layer, 0) + rooms[layer].blocks
        yield {name: counts[name] for name in rooms if name in counts}


def random_pick(
    rooms: Mapping[str, Room], steps: Mapping[str, int], draw: random.Random
) -> tuple[str, tuple[int, ...]]:
    """A layer, all with a step equally likely, and as many of its filters, all equally likely, as many of each block.

    Raises ExhaustedError if no layer has a step.
    """
    open_layers = [layer for layer, step in steps.items() if step]
    if not open_layers:
        raise ExhaustedError("no layer has a filter left to give: raise prune.max_pruned or lower the target")
    layer = draw.choice(open_layers)
    room = rooms[layer]
    width = room.filters // room.blocks
    filters = [
        block * width + index
        for block in range(room.blocks)
        for index in draw.sample(range(width), steps[layer] // room.blocks)
    ]
    return layer, tuple(sorted(filters))


def within(scores: Mapping[str, torch.Tensor], rooms: Mapping[str, Room]) -> dict[str, torch.Tensor]:
    """The scores (N,) of each layer, infinite for all but the lowest that may go."""
    limited = {}
    for layer, values in scores.items():
        room = rooms[layer]
        going = list(criteria.lowest(values, room.allowed, room.blocks))
        limited[layer] = torch.full_like(values, torch.inf)
        limited[layer][going] = values[going]
    return limited


def deciding_layers(graph: PruningGraph) -> list[str]:
    """The prunable layers, without those whose filters are coupled to an earlier one's; in network order."""
    decided: set[str] = set()
    deciding = []
    for layer, group in graph.layers.items():
        if layer not in decided:
            deciding.append(layer)
            one = graph.removal(layer, range(0, group.filters, group.filters // group.blocks))
            decided |= {side.module for side in one if side.role == "filters"}
    return deciding


class _Scored:
    """An executor that has the network for scoring and its scores already; losses are another's to measure."""

    def __init__(self, executor: Executor, network: NetworkState, scores: Mapping[str, torch.Tensor]) -> None:
        self._executor, self._network, self._scores = executor, network, scores

    def for_scoring(self, network: NetworkState) -> NetworkState:
        return self._network

    def measure(
        self, network: NetworkState, tasks: Sequence[LossTask], on_result: OnResult, on_share: OnShare
    ) -> list[MeasuredLoss]:
        return self._executor.measure(network, tasks, on_result, on_share)

    def importance(self, network: NetworkState, wanted: Wanted) -> Mapping[str, torch.Tensor]:
        return self._scores

    def close(self) -> None:
        self._executor.close()


def _hear_nothing(*heard: object) -> None:
    return None
