"""PLS filter pruning: every turn the filters that tell least of the classes go, of all layers together.

Source: Jordao et al., BMVC workshop 2019 and Neurocomputing 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from laasp_ray import criteria
from laasp_ray.config import PruneConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.errors import ExhaustedError, SearchError
from laasp_ray.methods.turn import OnCandidate, Stopwatch, Turn
from laasp_ray.pruning.channels import plan_of
from laasp_ray.pruning.groups import PruningGraph
from laasp_ray.pruning.masks import mask_of
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.plan import Plan, macs_after
from laasp_ray.pruning.several import independent_layers, removal_of_several
from laasp_ray.records import Decision, LayerPrune, Ranking
from laasp_ray.search.activations import Wanted
from laasp_ray.search.candidates import Baseline
from laasp_ray.search.evaluate import LossTask
from laasp_ray.search.executor import Executor


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
    """Scores all filters anew, and chooses; `model` is `network` rebuilt, and is not changed.

    The decision's losses tell what the prune costs; they do not enter into it. There are no candidates for
    `on_candidate` to hear of. Raises ExhaustedError when nothing is left to prune.
    """
    clock = Stopwatch()
    graph = PruningGraph(model, example_input, ignored=config.ignored, extra_layers=config.extra_layers)
    layers = independent_layers(graph)
    if not layers:
        raise ExhaustedError(
            "no layer has a filter left to give: set prune.iterations, lower the target, or ignore fewer layers"
        )
    clock.lap("graph")
    network = executor.for_scoring(network)
    scores = executor.importance(network, Wanted.of(layers, config))
    clock.lap("score")
    blocks = {layer: graph.layers[layer].blocks for layer in layers}
    chosen = choose(scores, blocks, config.percent, config.round_to)
    removal = removal_of_several(graph, chosen)
    step = plan_of(removal)
    tasks = [LossTask("the prune by pls", step, mask_of(removal)), LossTask("the network before", Plan.empty(), {})]
    after, before = executor.measure(network, tasks, lambda position, result: None, lambda share: None)
    if after.error:
        raise SearchError(f"the network that pls leaves cannot be evaluated: {after.error}")
    clock.lap("evaluate")
    prunes = [LayerPrune(layer=layer, criterion="pls", filters=filters) for layer, filters in chosen.items()]
    macs = count_macs(model, example_input)
    decision = Decision(
        turn=turn,
        layer=prunes[0].layer,
        criterion=prunes[0].criterion,
        filters=prunes[0].filters,
        loss=after.loss,
        loss_before=before.loss,
        flops_reduction=1 - macs_after(macs, step) / baseline.macs.total,
        further=tuple(prunes[1:]),
    )
    return Turn(decision, step, Ranking([]), clock.seconds)


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
