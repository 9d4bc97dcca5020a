"""PLS filter pruning: each iteration removes the filters that are least informative about the classes, over all layers.

Source: Jordao et al., BMVC workshop 2019 and Neurocomputing 2020.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from laasp_ray import criteria
from laasp_ray.config import PlsConfig
from laasp_ray.cost.macs import Macs
from laasp_ray.errors import ExhaustedError
from laasp_ray.methods.base import IterationContext, IterationResult, PruningMethod
from laasp_ray.methods.estimate import Estimate, assumed, described
from laasp_ray.methods.preparation import Preparation, UnprunedNetwork, prepare_filters, section_of
from laasp_ray.models.copying import deep_copy
from laasp_ray.pruning.channels import plan_of
from laasp_ray.pruning.graph import PruningGraph, reachable, reachable_parameters
from laasp_ray.pruning.joint import independent_layers, joint_removal
from laasp_ray.search.activations import ImportanceRequest, check_request
from laasp_ray.search.candidates import reaches_targets

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The shares of every layer's filters at which an estimate counts the reductions. Other shares are interpolated
linearly.
"""


@dataclass(frozen=True, kw_only=True)
class PlsEstimate(Estimate):
    """`layers` can be pruned and have `filters` in all; the `first` iteration removes so many of them. `removes` is the
    mean share of FLOPs that an iteration removes.
    """

    layers: int
    filters: int
    first: int
    removes: float


class PlsPruning(PruningMethod[PlsConfig]):
    """PLS: each iteration removes the filters that are least informative about the classes, over all layers."""

    config_class = PlsConfig

    def prepare(self, network: UnprunedNetwork) -> Preparation:
        prepared, graph = prepare_filters(network, independent=True)
        request = ImportanceRequest.of(independent_layers(graph), "pls", section_of(network.config, PlsConfig))
        check_request(deep_copy(network.model), network.example_input, request)
        return prepared

    def iterate(self, context: IterationContext[PlsConfig]) -> IterationResult:
        """Scores all filters again and chooses. There are no candidates to report to `on_candidate`.

        Raises ExhaustedError when nothing is left to prune.
        """
        layers = independent_layers(context.graph)
        if not layers:
            raise ExhaustedError(
                "no layer has a filter left to give: set prune.iterations, lower the target, or ignore fewer layers"
            )
        context.clock.lap("graph")
        scores = context.executor.importance(context.scored, ImportanceRequest.of(layers, "pls", context.config))
        scores = {layer: context.graph.layers[layer].of_filters(of_rows) for layer, of_rows in scores.items()}
        context.clock.lap("score")
        blocks = {layer: context.graph.layers[layer].blocks for layer in layers}
        wanted = removed_by(context.config.percent, sum(len(values) for values in scores.values()))

        def lowest(count: int) -> dict[str, tuple[int, ...]]:
            return choose(scores, blocks, count, context.config.round_to)

        def reaches(count: int) -> bool:
            step = plan_of(joint_removal(context.graph, lowest(count)))
            return reaches_targets(context.graph, context.macs, context.baseline, context.config, step)

        if context.config.exact_target and context.config.targets and reaches(wanted):
            # Not by bisection: a layer that would vanish keeps its filters, so that more may reach less.
            wanted = next(filter(reaches, range(1, wanted)), wanted)
        return context.prune(lowest(wanted), "pls")

    def estimate(self, network: UnprunedNetwork, prepared: Preparation, calibration_images: int) -> PlsEstimate:
        config, prune = network.config, section_of(network.config, PlsConfig)
        started = time.perf_counter()
        graph = network.graph()
        layers = independent_layers(graph)
        preparing = time.perf_counter() - started
        filters = sum(graph.layers[layer].filters for layer in layers)
        gone = _gone_after(filters, _gone_with(graph, prepared.baseline.macs, layers, prune.round_to), prune)
        removes, fine_tunes = gone[-1] / len(gone), _fine_tunes(gone, prune)
        # One pass computes the scores, two measure the losses after and before the prune.
        passes = 3 + config.search.reestimate_batchnorm
        first = removed_by(prune.percent, filters)
        most = "at most " if len(gone) == 1 and prune.exact_target else ""
        rows = [
            (
                "filters",
                f"{filters:,} in {len(layers)} layers that no others are coupled to; {most}{first:,} go in the "
                f"first iteration, {prune.percent:g}% of those left in each",
            ),
            (
                "evaluated",
                f"{calibration_images:,} images: scored, then the loss without the filters that go and with them, "
                f"worth {passes:.0f} forward passes over them",
            ),
        ]
        own = [
            "every layer loses the same share of its filters: which tell least is not known before they are scored",
            "fitting the scores takes no time",
        ]
        return PlsEstimate(
            iterations=len(gone),
            fine_tunes=fine_tunes,
            passes=passes,
            preparing_s=preparing,
            rows=described(prune, len(gone), removes, "an iteration", rows, fine_tunes),
            assumptions=assumed(prune, own),
            layers=len(layers),
            filters=filters,
            first=first,
            removes=removes,
        )


def choose(
    scores: Mapping[str, torch.Tensor], blocks: Mapping[str, int], wanted: int, round_to: int = 1
) -> dict[str, tuple[int, ...]]:
    """The `wanted` filters with the lowest scores, by layer.

    `scores` has (N,) for each layer. `blocks` is the number of equal blocks of a layer's filters; each block must lose
    the same number. A layer loses fewer filters if its number does not divide into blocks or does not leave a multiple
    of `round_to` filters. If no layer can lose any, the number rises by one until a layer can. Among equal scores the
    earlier layer and then the lower index goes first. A layer that would lose all filters keeps them, and the next
    lowest filters of other layers go instead. Raises ExhaustedError if nothing can be removed.
    """
    asked = wanted
    open_layers = list(scores)
    while open_layers:
        counts = _lowest_counts({layer: scores[layer] for layer in open_layers}, wanted)
        vanishing = {layer for layer, count in counts.items() if count == len(scores[layer])}
        if vanishing:
            open_layers = [layer for layer in open_layers if layer not in vanishing]
            continue
        whole = {layer: _whole(len(scores[layer]), count, blocks[layer], round_to) for layer, count in counts.items()}
        chosen = {
            layer: criteria.lowest(scores[layer], count, blocks[layer]) for layer, count in whole.items() if count
        }
        if chosen:
            return chosen
        wanted += 1
    raise ExhaustedError(
        f"of {len(scores)} layers none can give filters when {asked} are to go: every one would vanish, or lose less "
        f"than one filter of each of its blocks, or not be left with a multiple of {round_to} (prune.round_to); change "
        "prune.percent, or set prune.iterations"
    )


def _whole(filters: int, count: int, blocks: int, round_to: int) -> int:
    """The largest number up to `count` that leaves equal blocks and a multiple of `round_to` filters."""
    unit = math.lcm(blocks, round_to)
    return max(0, filters - math.ceil((filters - count) / unit) * unit)


def _lowest_counts(scores: Mapping[str, torch.Tensor], wanted: int) -> dict[str, int]:
    """How many of the `wanted` lowest scores belong to each layer."""
    lowest = torch.cat(list(scores.values())).argsort(stable=True)[:wanted]
    owners = torch.repeat_interleave(
        torch.arange(len(scores)), torch.tensor([len(values) for values in scores.values()])
    )
    counts = owners[lowest].bincount(minlength=len(scores)).tolist()
    return dict(zip(scores, counts, strict=True))


def removed_by(percent: float, filters: int) -> int:
    """The number of filters that an iteration removes when `filters` are left: `percent` (of 100) of them, rounded, at
    least 1.
    """
    return max(1, math.floor(percent / 100 * filters + 0.5))


def _gone_with(
    graph: PruningGraph, macs: Macs, layers: tuple[str, ...], round_to: int
) -> Callable[[float], Mapping[str, float]]:
    """A function: share of filters that each of `layers` lost -> reductions of FLOPs, parameters and latency (taken as
    that of FLOPs).
    """
    flops = [reachable(graph, macs, max_pruned=share, layers=layers, round_to=round_to) for share in _SHARES]
    parameters = [reachable_parameters(graph, max_pruned=share, layers=layers, round_to=round_to) for share in _SHARES]

    def gone(share: float) -> dict[str, float]:
        of_flops = float(np.interp(share, _SHARES, flops))
        return {"FLOPs": of_flops, "parameters": float(np.interp(share, _SHARES, parameters)), "latency": of_flops}

    return gone


def _gone_after(filters: int, gone: Callable[[float], Mapping[str, float]], config: PlsConfig) -> list[float]:
    """The FLOPs reduction after each iteration, until the targets are reached or no iterations are left."""
    left = filters
    after: list[float] = []
    while left and not 0 < config.iterations <= len(after):
        left -= removed_by(config.percent, left)
        shares = gone(1 - left / filters)
        after.append(shares["FLOPs"])
        if config.reaches_targets(shares):
            if config.exact_target and config.targets.keys() == {"FLOPs"}:
                after[-1] = min(after[-1], config.flops_reduction)
            break
    return after


def _fine_tunes(gone: list[float], config: PlsConfig) -> int:
    """The number of fine-tunes, for these FLOPs reductions after each iteration."""
    fine_tunes, fine_tuned_at = 0, 0.0
    for share in gone:
        if config.fine_tunes_after(share - fine_tuned_at):
            fine_tunes, fine_tuned_at = fine_tunes + 1, share
    return fine_tunes
