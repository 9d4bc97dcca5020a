"""PLS filter pruning: every iteration the filters that tell least of the classes go, of all layers together.

Source: Jordao et al., BMVC workshop 2019 and Neurocomputing 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from laasp_ray import criteria
from laasp_ray.errors import ExhaustedError
from laasp_ray.methods.base import IterationContext, IterationResult, PruningMethod
from laasp_ray.pruning.joint import independent_layers
from laasp_ray.search.activations import ImportanceRequest


class PlsPruning(PruningMethod):
    """The filters that tell least of the classes, of all layers together."""

    def iterate(self, context: IterationContext) -> IterationResult:
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
    asked = wanted = max(1, math.floor(percent / 100 * sum(len(values) for values in scores.values()) + 0.5))
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
