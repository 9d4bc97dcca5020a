"""The search: candidates, their losses, the choice. `rank` does one turn of it on any network, without a cluster."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from laasp_ray.config import DEFAULT_CRITERIA, PruneConfig, StepRule
from laasp_ray.cost.macs import count_macs
from laasp_ray.pruning.groups import PruningGraph
from laasp_ray.records import CandidateLoss, Ranking
from laasp_ray.search.candidates import measure_baseline, propose
from laasp_ray.search.evaluate import LossSubset, LossTask, Prepare, measure_all, ready

__all__ = ["rank"]


def rank(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    criteria: Sequence[str] = DEFAULT_CRITERIA,
    step: float = 0.01,
    step_rule: StepRule = "flops_share",
    max_pruned: float = 0.75,
    ignored: Sequence[str] = (),
    extra_layers: Sequence[str] = (),
    reference: nn.Module | None = None,
    batch_size: int = 250,
    prepare: Prepare | None = None,
) -> Ranking:
    """Every prune that one turn of LAASP could make on `model`, with its loss, least loss first.

    `images` (n, C, H, W) are what the network takes, or what `prepare` turns into it batch by batch; `labels` (n,) are
    class indices; both on the model's device. `reference` is the unpruned network that step sizes, limits and FLOPs
    reductions are against (default: `model` itself). An entry has `.layer`, `.criterion`, `.filters`, `.loss`, the mean
    cross-entropy, and `.flops_reduction` after its prune. The losses are exhaustive: a physically pruned copy of the
    network sees every image. `model` is left as it was.

    Source: Ghimire, Lee, Kim, Image and Vision Computing 136 (2023) 104745.
    Raises ConfigError for settings, PruningError for networks and SearchError for candidates that do not work.
    """
    # rank() has no target; PruneConfig wants one, and checks all the rest.
    config = PruneConfig(
        flops_reduction=0.5,
        step=step,
        step_rule=step_rule,
        max_pruned=max_pruned,
        ignored=tuple(ignored),
        extra_layers=tuple(extra_layers),
        criteria=tuple(criteria),
    )
    subset = LossSubset(images, labels, batch_size, prepare)
    example = next(subset.batches())[0][:1]
    model = ready(copy.deepcopy(model), images.device)

    def graph_of(network: nn.Module) -> PruningGraph:
        return PruningGraph(network, example, ignored=config.ignored, extra_layers=config.extra_layers)

    graph, macs = graph_of(model), count_macs(model, example)
    if reference is None:
        baseline = measure_baseline(graph, macs, config)
    else:
        baseline = measure_baseline(graph_of(reference), count_macs(reference, example), config)
    proposals = propose(model, graph, macs, baseline, config)
    results = measure_all(model, [LossTask(p.candidate.name, p.step) for p in proposals], subset)
    return Ranking(
        [
            CandidateLoss(candidate=proposal.candidate, loss=result.loss, images=result.images, seconds=result.seconds)
            for proposal, result in zip(proposals, results, strict=True)
        ]
    )
