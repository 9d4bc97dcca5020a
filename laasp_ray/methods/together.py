"""Several prunes in one turn: the best candidate, and the next best ones that have nothing to do with it."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from laasp_ray.config import PruneConfig
from laasp_ray.cost.macs import Macs
from laasp_ray.pruning.channels import Removal, Side, plan_of, unite
from laasp_ray.pruning.groups import PruningGraph
from laasp_ray.pruning.masks import mask_of
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.plan import Plan, macs_after, parameters_after
from laasp_ray.records import CandidateLoss, Decision, LayerPrune, Ranking
from laasp_ray.search.candidates import Baseline
from laasp_ray.search.evaluate import LossTask
from laasp_ray.search.executor import Executor

logger = logging.getLogger(__name__)


def with_next_best(
    decision: Decision,
    ranking: Ranking,
    graph: PruningGraph,
    macs: Macs,
    baseline: Baseline,
    config: PruneConfig,
    network: NetworkState,
    executor: Executor,
) -> tuple[Decision, Plan]:
    """`decision`, for the best of `ranking`, with the next best, `config.prunes_per_turn` in all; and their one plan.

    Taken in their order are those with a finite loss that no race dropped and whose prune changes no side of a module
    that one before them does, until the targets are reached; a target for latency is not told before it is measured.
    The loss of the network without all of them is measured, and is the decision's. Where it is not finite the best goes
    alone. A race has a bound for the best only (search/racing.py): the others come in the order of their estimates.
    """
    picked, removal = _pick(ranking, graph, macs, baseline, config)
    step = plan_of(removal)
    if len(picked) == 1:
        return decision, step
    tasks = [
        LossTask("this turn's prunes together", step, mask_of(removal)),
        LossTask("the network before this turn's prunes", Plan.empty(), {}),
    ]
    together, _ = executor.measure(network, tasks, lambda position, result: None, lambda share: None)
    if not math.isfinite(together.loss):
        names = ", ".join(entry.candidate.name for entry in picked)
        logger.warning("only the best goes of %s: together they have no loss (%s)", names, together.error or "infinite")
        return decision, graph.step(decision.layer, decision.filters)
    decision = replace(
        decision,
        loss=together.loss,
        flops_reduction=1 - macs_after(macs, step) / baseline.macs.total,
        further=tuple(
            LayerPrune(layer=entry.layer, criterion=entry.criterion, filters=entry.filters) for entry in picked[1:]
        ),
    )
    return decision, step


def _pick(
    ranking: Ranking, graph: PruningGraph, macs: Macs, baseline: Baseline, config: PruneConfig
) -> tuple[list[CandidateLoss], Removal]:
    picked: list[CandidateLoss] = []
    total: dict[Side, set[int]] = {}
    for entry in ranking:
        if picked and (entry.dropped_at is not None or not math.isfinite(entry.loss)):
            break  # a ranking has these last
        removal = {side: channels for side, channels in graph.removal(entry.layer, entry.filters).items() if channels}
        if total.keys() & removal.keys():
            continue
        picked.append(entry)
        unite(total, removal)
        if len(picked) == config.prunes_per_turn or _reached(plan_of(total), graph, macs, baseline, config):
            break
    return picked, total


def _reached(step: Plan, graph: PruningGraph, macs: Macs, baseline: Baseline, config: PruneConfig) -> bool:
    gone = {
        "FLOPs": 1 - macs_after(macs, step) / baseline.macs.total,
        "parameters": 1 - parameters_after(graph.shapes, step) / baseline.parameters,
    }
    return all(of in gone and gone[of] >= share for of, share in config.targets.items())
