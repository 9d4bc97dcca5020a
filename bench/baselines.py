"""What LAASP is compared with in bench/methods.py: other ways to choose what goes, each an iteration of the same worth.

An iteration is a `laasp_ray.methods.PruningMethod`. Each keeps within `prune.max_pruned`, and is worth about
`prune.step` of the unpruned network's multiply-accumulates, or a layer's step where an iteration prunes one layer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TypeVar

import torch
import torch_pruning

from laasp_ray import criteria
from laasp_ray.config import RunConfig
from laasp_ray.data.calibration import draw_calibration_images
from laasp_ray.data.loaders.decoding import normalise
from laasp_ray.data.ordering import derive_seed
from laasp_ray.data.sources.registry import open_source
from laasp_ray.errors import ExhaustedError
from laasp_ray.methods import IterationContext, IterationResult, PruningMethod, pls
from laasp_ray.models.copying import deep_copy
from laasp_ray.pruning.channels import plan_of
from laasp_ray.pruning.graph import PruningGraph, filters_to_remove
from laasp_ray.pruning.joint import independent_layers, joint_removal
from laasp_ray.search.activations import ImportanceRequest

GRADIENTS_AT_ONCE = 250
"""Images of one backward pass."""

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


class UniformPruning(PruningMethod):
    """All layers lose the same share of their original filters, lowest l1 first, up to whole filters.

    So the filters go one after the other, each from the layer that has lost the least share. Of layers whose filters
    are coupled the first decides for all.
    """

    def iterate(self, context: IterationContext) -> IterationResult:
        rooms = rooms_of(context, deciding_layers(context.graph))
        context.clock.lap("graph")
        scores = {layer: criteria.scores("l1", context.model.get_submodule(layer)) for layer in rooms}

        def picks(counts: Mapping[str, int]) -> Picks:
            return {
                layer: criteria.lowest(scores[layer], count, rooms[layer].blocks) for layer, count in counts.items()
            }

        chosen = worth_about(map(picks, evenly(rooms)), lambda picks: worth(context, picks), context.config.step)
        context.clock.lap("propose")
        return context.prune(chosen, "l1")


class RandomPruning(PruningMethod):
    """The method of a run of `seed`: a random layer loses its step's number of random filters."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def iterate(self, context: IterationContext) -> IterationResult:
        rooms = rooms_of(context, context.graph.layers)
        context.clock.lap("graph")
        draw = random.Random(derive_seed(self._seed, f"random prune, iteration {context.iteration}"))
        steps = {layer: removable(context, layer, context.baseline.step_sizes.get(layer, 1)) for layer in rooms}
        layer, filters = random_pick(rooms, steps, draw)
        context.clock.lap("propose")
        return context.prune({layer: filters}, "random")


class PlsByFlops(PruningMethod):
    """The library's PLS, at the number of filters that makes this iteration worth most nearly `prune.step`.

    A layer at `prune.max_pruned` keeps what it has: its other filters' scores are infinite.
    """

    def iterate(self, context: IterationContext) -> IterationResult:
        rooms = rooms_of(context, independent_layers(context.graph))
        context.clock.lap("graph")
        scores = within(
            context.executor.importance(context.scored, ImportanceRequest.of(rooms, "pls", context.config)), rooms
        )
        blocks = {layer: room.blocks for layer, room in rooms.items()}
        counts = range(1, 1 + sum(room.allowed for room in rooms.values()))
        chosen = worth_about(
            (pls.choose(scores, blocks, count) for count in counts),
            lambda picks: worth(context, picks),
            context.config.step,
        )
        context.clock.lap("score")
        return context.prune(chosen, "pls")


class TorchPruning(PruningMethod):
    """torch-pruning's own base pruner, global over all layers, by its importance of this name.

    The share of channels is raised by thousandths until an iteration is worth `prune.step`. A layer that would get
    below its limit keeps what it has. An importance of gradients needs the run's config: gradients are those of the
    summed loss of its calibration images, with BatchNorm in eval mode.
    """

    def __init__(self, importance: str, config: RunConfig | None = None) -> None:
        self._importance, self._config = importance, config

    def iterate(self, context: IterationContext) -> IterationResult:
        rooms = rooms_of(context, context.graph.layers)
        context.clock.lap("graph")
        gradients = gradients_of(context.model, *self._images) if self._config is not None else {}
        context.clock.lap("score")
        ratios = (ratio / 1000 for ratio in range(2, 500, 2))
        options = (picks for ratio in ratios if (picks := self._picks(context, rooms, ratio, gradients)))
        chosen = worth_about(options, lambda picks: worth(context, picks), context.config.step)
        context.clock.lap("propose")
        return context.prune(chosen, self._importance)

    @cached_property
    def _images(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._config is not None
        data, count = self._config.data, self._config.search.images
        drawn = draw_calibration_images(open_source(data, "train"), data, images=count, seed=self._config.seed)
        return normalise(drawn.images, data), drawn.labels

    def _picks(
        self, now: IterationContext, rooms: Mapping[str, Room], ratio: float, gradients: Mapping[str, torch.Tensor]
    ) -> Picks:
        model = deep_copy(now.model)
        for name, gradient in gradients.items():
            model.get_parameter(name).grad = gradient
        names = {module: name for name, module in model.named_modules()}
        layers = torch.nn.modules.conv._ConvNd | torch.nn.Linear
        kept = [module for module, name in names.items() if isinstance(module, layers) and name not in rooms]
        pruner = torch_pruning.pruner.BasePruner(
            model,
            now.example_input,
            importance=getattr(torch_pruning.importance, self._importance)(),
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=kept,
        )
        chosen = {}
        for group in pruner.step(interactive=True):
            layer, filters = names[group[0].dep.target.module], tuple(sorted(set(group[0].idxs)))
            if layer in rooms and 0 < len(filters) <= rooms[layer].allowed:
                chosen[layer] = filters
        return chosen


def gradients_of(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of each parameter: of the summed cross-entropy of images (B, C, H, W), the model in eval mode."""
    copy = deep_copy(model).eval().requires_grad_()
    for some, wanted in zip(images.split(GRADIENTS_AT_ONCE), labels.split(GRADIENTS_AT_ONCE), strict=True):
        torch.nn.functional.cross_entropy(copy(some), wanted, reduction="sum").backward()
    return {name: parameter.grad for name, parameter in copy.named_parameters() if parameter.grad is not None}


def rooms_of(now: IterationContext, layers: Iterable[str]) -> dict[str, Room]:
    """Each layer's room for its whole width."""
    rooms = {}
    for layer in layers:
        group = now.graph.layers[layer]
        original = now.baseline.filters.get(layer, group.filters)
        rooms[layer] = Room(group.filters, original, group.blocks, removable(now, layer, group.filters))
    return rooms


def removable(now: IterationContext, layer: str, step_size: int) -> int:
    """How many filters LAASP would take of the layer, were `step_size` its step; 0 if it is at its limit."""
    group = now.graph.layers[layer]
    return filters_to_remove(
        group,
        step_size=step_size,
        original=now.baseline.filters.get(layer, group.filters),
        step_rule="flops_share",
        step=now.config.step,
        max_pruned=now.config.max_pruned,
    )


def worth(now: IterationContext, picks: Picks) -> float:
    """The share of the unpruned network's multiply-accumulates that goes with these filters."""
    before = 1 - now.macs.total / now.baseline.macs.total
    return now.flops_reduction(plan_of(joint_removal(now.graph, picks))) - before


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
