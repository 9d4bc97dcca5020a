"""PLS filter pruning: every iteration the filters that tell least of the classes go, of all layers together.

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
from laasp_ray.config import PlsConfig, RunConfig
from laasp_ray.cost.macs import Macs
from laasp_ray.errors import ExhaustedError
from laasp_ray.methods.base import IterationContext, IterationResult, PruningMethod
from laasp_ray.methods.estimate import Estimate, assumed, described
from laasp_ray.methods.preparation import Preparation, UnprunedNetwork, prepare_filters
from laasp_ray.models.copying import deep_copy
from laasp_ray.pruning.graph import PruningGraph, reachable, reachable_parameters
from laasp_ray.pruning.joint import independent_layers
from laasp_ray.search.activations import ImportanceRequest, check_request

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of every layer's filters that an estimate's prunes are counted at; what lies between is on a straight line."""


@dataclass(frozen=True, kw_only=True)
class PlsEstimate(Estimate):
    """`layers` that filters may go of, how many `filters` these have, and how many go in the `first` iteration;
    `removes` is the mean share of FLOPs that an iteration takes."""

    layers: int
    filters: int
    first: int
    removes: float


class PlsPruning(PruningMethod[PlsConfig]):
    """The filters that tell least of the classes, of all layers together."""

    config_class = PlsConfig

    def prepare(self, network: UnprunedNetwork) -> Preparation:
        prepared, graph = prepare_filters(network, independent=True)
        request = ImportanceRequest.of(independent_layers(graph), "pls", _section(network.config))
        check_request(deep_copy(network.model), network.example_input, request)
        return prepared

    def iterate(self, context: IterationContext[PlsConfig]) -> IterationResult:
        """Scores all filters anew, and chooses. There are no candidates to report to `on_candidate`.

        Raises ExhaustedError when nothing is left to prune.
        """
        layers = independent_layers(context.graph)
        if not layers:
            raise ExhaustedError(
                "no layer has a filter left to give: set prune.iterations, lower the target, or ignore fewer layers"
            )
        context.clock.lap("graph")
        scores = context.executor.importance(context.scored, ImportanceRequest.of(layers, "pls", context.config))
        context.clock.lap("score")
        blocks = {layer: context.graph.layers[layer].blocks for layer in layers}
        return context.prune(choose(scores, blocks, context.config.percent, context.config.round_to), "pls")

    def estimate(self, network: UnprunedNetwork, prepared: Preparation, calibration_images: int) -> PlsEstimate:
        config, prune = network.config, _section(network.config)
        started = time.perf_counter()
        graph = network.graph()
        layers = independent_layers(graph)
        preparing = time.perf_counter() - started
        filters = sum(graph.layers[layer].filters for layer in layers)
        gone = _gone_after(filters, _gone_with(graph, prepared.baseline.macs, layers, prune.round_to), prune)
        removes, fine_tunes = gone[-1] / len(gone), _fine_tunes(gone, prune)
        # The scores, and the losses without what goes and of the network as it stands.
        passes = 3 + config.search.reestimate_batchnorm
        first = _removed(filters, prune.percent)
        rows = [
            (
                "filters",
                f"{filters:,} in {len(layers)} layers that no others are coupled to; {first:,} go in the first "
                f"iteration, {prune.percent:g}% of those left in each",
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


def _section(config: RunConfig) -> PlsConfig:
    assert isinstance(config.prune, PlsConfig)  # the config and the method are of each other
    return config.prune


def choose(
    scores: Mapping[str, torch.Tensor], blocks: Mapping[str, int], percent: float, round_to: int = 1
) -> dict[str, tuple[int, ...]]:
    """The `percent` (of 100) of all filters that score lowest, by layer; rounded to the nearest, one at least.

    `scores` has each layer's (N,), `blocks` into how many equal blocks a layer's filters fall, that must lose the same
    count each: what does not divide stays, and so does what would not leave the layer a multiple of `round_to` filters.
    If that is all, more are taken, one by one, until a layer can give some. Of equal scores the earlier layer's and the
    lower index goes first. A layer that would vanish keeps its filters, and the next lowest of other layers go in their
    place. Raises ExhaustedError if nothing can go.
    """
    asked = wanted = _removed(sum(len(values) for values in scores.values()), percent)
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
    """At most `count`, so that what is left of the filters falls in equal blocks and is a multiple of `round_to`."""
    unit = math.lcm(blocks, round_to)
    return max(0, filters - math.ceil((filters - count) / unit) * unit)


def _lowest_counts(scores: Mapping[str, torch.Tensor], wanted: int) -> dict[str, int]:
    """How many of the `wanted` lowest scores are each layer's."""
    lowest = torch.cat(list(scores.values())).argsort(stable=True)[:wanted]
    owners = torch.repeat_interleave(
        torch.arange(len(scores)), torch.tensor([len(values) for values in scores.values()])
    )
    counts = owners[lowest].bincount(minlength=len(scores)).tolist()
    return dict(zip(scores, counts, strict=True))


def _removed(filters: int, percent: float) -> int:
    """How many of the filters that are left an iteration takes."""
    return max(1, math.floor(percent / 100 * filters + 0.5))


def _gone_with(
    graph: PruningGraph, macs: Macs, layers: tuple[str, ...], round_to: int
) -> Callable[[float], Mapping[str, float]]:
    """What is gone of FLOPs, parameters and latency (as FLOPs) when `layers` each lost a share of their filters."""
    flops = [reachable(graph, macs, max_pruned=share, layers=layers, round_to=round_to) for share in _SHARES]
    parameters = [reachable_parameters(graph, max_pruned=share, layers=layers, round_to=round_to) for share in _SHARES]

    def gone(share: float) -> dict[str, float]:
        of_flops = float(np.interp(share, _SHARES, flops))
        return {"FLOPs": of_flops, "parameters": float(np.interp(share, _SHARES, parameters)), "latency": of_flops}

    return gone


def _gone_after(filters: int, gone: Callable[[float], Mapping[str, float]], config: PlsConfig) -> list[float]:
    """The share of FLOPs that is gone after each iteration, until the targets are reached or the iterations used up."""
    left = filters
    after: list[float] = []
    while left and not 0 < config.iterations <= len(after):
        left -= _removed(left, config.percent)
        shares = gone(1 - left / filters)
        after.append(shares["FLOPs"])
        if all(shares[of] >= share for of, share in config.targets.items()):
            break
    return after


def _fine_tunes(gone: list[float], config: PlsConfig) -> int:
    """How many follow iterations after which these shares of FLOPs are gone."""
    fine_tunes, fine_tuned_at = 0, 0.0
    for share in gone:
        if config.fine_tunes_after(share - fine_tuned_at):
            fine_tunes, fine_tuned_at = fine_tunes + 1, share
    return fine_tunes
