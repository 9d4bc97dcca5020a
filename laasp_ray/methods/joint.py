"""Several prunes in one iteration: the best candidate, and the next best ones that are independent of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from laasp_ray.config import LaaspConfig
from laasp_ray.criteria import lowest
from laasp_ray.methods.base import IterationContext
from laasp_ray.pruning.channels import ChannelAxis, Removal, plan_of, unite
from laasp_ray.records import CandidateLoss, Decision, LayerPrune, Ranking
from laasp_ray.search.candidates import fewer_filters, reaches_targets

ScoresOf = Callable[[str, str], torch.Tensor]
"""(criterion, layer) -> the scores, of the layer's filters or of their rows, that it chose by."""

logger = logging.getLogger(__name__)


def with_next_best(
    now: IterationContext[LaaspConfig], decision: Decision, ranking: Ranking, scores: ScoresOf
) -> tuple[Decision, Removal]:
    """Adds the next best candidates to `decision`, which is for the best of `ranking`; also returns what they remove.

    There are at most `prune.prunes_per_iteration` prunes. Candidates are taken in the order of `ranking`. A candidate
    is taken if its loss is finite, no race dropped it, and no candidate before it changes the same side of a module.
    Taking ends when the targets are reached; a target for latency is not known before it is measured. With
    `prune.exact_target` the last of several takes only as many filters, the lowest by its `scores`, as the target
    needs. The decision's
    loss is the measured loss of the network without all of them. If that is not finite, only the best is pruned. A race
    bounds the error for the best only (search/racing.py): the others are in the order of their estimates.
    """
    picked, removal = _pick(now, ranking, scores)
    if len(picked) == 1:
        return decision, removal
    joint, _ = now.measure(removal, "this iteration's prunes together")
    if not math.isfinite(joint.loss):
        names = ", ".join(entry.candidate.name for entry in picked)
        logger.warning("only the best goes of %s: together they have no loss (%s)", names, joint.error or "infinite")
        return decision, now.graph.removal(decision.layer, decision.filters)
    decision = replace(
        decision,
        loss=joint.loss,
        flops_reduction=now.flops_reduction(plan_of(removal)),
        further=tuple(
            LayerPrune(layer=entry.layer, criterion=entry.criterion, filters=entry.filters) for entry in picked[1:]
        ),
    )
    return decision, removal


def _pick(
    now: IterationContext[LaaspConfig], ranking: Ranking, scores: ScoresOf
) -> tuple[list[CandidateLoss], Removal]:
    picked: list[CandidateLoss] = []
    total: dict[ChannelAxis, set[int]] = {}
    for entry in ranking:
        if picked and (entry.dropped_at is not None or not math.isfinite(entry.loss)):
            break  # dropped and non-finite entries come last in a ranking
        removal = _removal(now, entry)
        if total.keys() & removal.keys():
            continue
        is_reached = _reaches(now, total, removal)
        if is_reached and picked and now.config.exact_target:
            entry = _as_small_as_possible(now, entry, total, scores)
            removal = _removal(now, entry)
        picked.append(entry)
        unite(total, removal)
        if len(picked) == now.config.prunes_per_iteration or is_reached:
            break
    return picked, total


def _removal(now: IterationContext[LaaspConfig], entry: CandidateLoss) -> Removal:
    return {side: channels for side, channels in now.graph.removal(entry.layer, entry.filters).items() if channels}


def _reaches(now: IterationContext[LaaspConfig], total: Mapping[ChannelAxis, set[int]], removal: Removal) -> bool:
    """Whether the targets are reached without `total` and `removal`, which change different sides of modules."""
    together = {**total, **{side: set(channels) for side, channels in removal.items()}}
    return reaches_targets(now.graph, now.macs, now.baseline, now.config, plan_of(together))


def _as_small_as_possible(
    now: IterationContext[LaaspConfig], entry: CandidateLoss, total: Mapping[ChannelAxis, set[int]], scores: ScoresOf
) -> CandidateLoss:
    """`entry` with as few filters as the targets need beside `total`."""
    group = now.graph.layers[entry.layer]
    by_score = group.of_filters(scores(entry.criterion, entry.layer))
    for count in fewer_filters(group, len(entry.filters), now.config):
        candidate = replace(entry.candidate, filters=lowest(by_score, count, group.blocks))
        smaller = replace(entry, candidate=candidate)
        if _reaches(now, total, _removal(now, smaller)):
            return smaller
    return entry
