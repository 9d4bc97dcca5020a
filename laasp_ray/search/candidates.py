"""The candidates of an iteration: each criterion's choice of filters in every layer that can be pruned."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from laasp_ray import criteria
from laasp_ray.config import TARGET_ROUNDING, FilterPruneConfig, LaaspConfig
from laasp_ray.cost.macs import Macs
from laasp_ray.errors import ExhaustedError, PruningError
from laasp_ray.pruning.channels import Removal, plan_of
from laasp_ray.pruning.compensation import NOTHING, MadeUp
from laasp_ray.pruning.graph import ChannelGroup, PruningGraph, filters_to_remove, step_sizes
from laasp_ray.pruning.masking import CannotMask, Mask, mask_of
from laasp_ray.pruning.plan import Plan, macs_after, parameters_after
from laasp_ray.records import Candidate, CandidateLoss, MeasuredLoss, Ranking
from laasp_ray.search.evaluate import LossTask
from laasp_ray.search.scoring import ScoreMemory

Scores = Mapping[str, Mapping[str, torch.Tensor]]
"""Criterion -> layer -> a score for each of its filters, or of its rows where its filters are heads."""
NO_SCORES: Scores = {}
NETWORK_BEFORE = LossTask("the network before this iteration's prune", Plan.empty(), {})
"""The task of the current network. Its loss is what a candidate's loss is compared with."""

logger = logging.getLogger(__name__)


def not_made_up(removal: Removal) -> MadeUp:
    """Nothing is made up for."""
    return NOTHING


@dataclass(frozen=True)
class Baseline:
    """Values that are measured once, on the unpruned network, and hold for the whole run.

    `step_sizes` is the number of filters of a layer that one prune removes, before limits, for methods with such steps.
    `filters` is the number of filters of each layer, and `parameters` the number of parameters of the network.
    """

    macs: Macs
    parameters: int
    step_sizes: Mapping[str, int]
    filters: Mapping[str, int]
    skipped: Mapping[str, str]


@dataclass(frozen=True)
class Proposal:
    """A candidate with its prune, as a plan for the network that it was proposed for."""

    candidate: Candidate
    step: Plan
    mask: Mask | CannotMask
    made_up: MadeUp = field(default_factory=dict)


def measure_baseline(graph: PruningGraph, macs: Macs, config: FilterPruneConfig) -> Baseline:
    """Measures the baseline. `graph` and `macs` are those of the unpruned network."""
    steps = {}
    if isinstance(config, LaaspConfig):
        steps = step_sizes(graph, macs, step=config.step, step_rule=config.step_rule)
    return Baseline(
        macs=macs,
        parameters=parameters_after(graph.shapes, Plan.empty()),
        step_sizes=steps,
        filters={name: group.filters for name, group in graph.layers.items()},
        skipped=dict(graph.skipped),
    )


def propose(
    model: nn.Module,
    graph: PruningGraph,
    macs: Macs,
    baseline: Baseline,
    config: LaaspConfig,
    given: Scores = NO_SCORES,
    memory: ScoreMemory | None = None,
    made_up: Callable[[Removal], MadeUp] = not_made_up,
) -> list[Proposal]:
    """All candidates for `model`. `graph` and `macs` are the model's own graph and multiply-accumulates.

    `given` has the scores of criteria that need more than a layer's weights; a layer that one of them does not score
    has no pick of it. `memory` keeps the scores of the others from one call to the next. `made_up` says how readers
    make up for a prune. Layers are in network order, and criteria in the pool's order. With `prune.exact_target` a
    prune that reaches the target takes no more filters than the target needs. Criteria that choose the same filters of
    a layer make one candidate. Layers of one coupled group make one candidate if they remove the same channels; the
    first of them gets it. Raises ExhaustedError if no layer has a filter left to prune.
    """
    memory = ScoreMemory() if memory is None else memory
    of_weights = [name for name in config.criteria if name not in given]
    proposals: dict[Hashable, Proposal] = {}
    counts, scored = counts_of(graph, macs, baseline, config), 0
    for layer, count in counts.items():
        group = graph.layers[layer]
        known = memory.scores(of_weights, layer, model.get_submodule(layer))
        scores = {name: given[name].get(layer) if name in given else known[name] for name in config.criteria}
        there = {name: group.of_filters(of_rows) for name, of_rows in scores.items() if of_rows is not None}
        scored += bool(there)
        for filters, proposers in _picks(there, count, group.blocks).items():
            removal = graph.removal(layer, filters)
            try:
                step = plan_of(removal)
            except PruningError as error:  # another layer would lose all its filters
                logger.debug("%s cannot lose %s: %s", layer, filters, error)
                continue
            key = _identity(removal)
            if key in proposals:
                proposals[key] = _also(proposals[key], layer, proposers)
                continue
            candidate = Candidate(
                layer=layer,
                criterion=proposers[0],
                filters=filters,
                flops_reduction=1 - macs_after(macs, step) / baseline.macs.total,
                also=tuple((layer, name) for name in proposers[1:]),
            )
            proposals[key] = Proposal(candidate, step, mask_of(removal), made_up(removal))
    if counts and not scored:
        raise ExhaustedError(
            f"{', '.join(config.criteria)} scores none of the {len(counts)} layers that have filters to give: obs "
            "needs layers to read them that can all be compensated (the log names others); add l1 to prune.criteria"
        )
    if not proposals:
        rounded = f" and prune.round_to={config.round_to}" if config.round_to > 1 else ""
        raise ExhaustedError(
            f"no layer has a filter left to give within prune.max_pruned={config.max_pruned}{rounded}: "
            "change that, lower the target, or ignore fewer layers"
        )
    return list(proposals.values())


def counts_of(graph: PruningGraph, macs: Macs, baseline: Baseline, config: LaaspConfig) -> dict[str, int]:
    """Layer -> the number of filters that a prune of it takes, for layers that have any to give."""
    counts = {}
    for layer, group in graph.layers.items():
        count = filters_to_remove(
            group,
            step_size=baseline.step_sizes.get(layer, 1),
            original=baseline.filters.get(layer, group.filters),
            step_rule=config.step_rule,
            step=config.step,
            max_pruned=config.max_pruned,
            round_to=config.round_to,
        )
        if count:
            counts[layer] = _enough(graph, layer, count, macs, baseline, config)
    return counts


def reaches_targets(graph: PruningGraph, macs: Macs, baseline: Baseline, config: FilterPruneConfig, step: Plan) -> bool:
    """Whether the network of `graph` and `macs` has reached all targets after `step`. A target of latency is not known
    before it is measured, and counts as not reached.
    """
    gone = {
        "FLOPs": 1 - macs_after(macs, step) / baseline.macs.total,
        "parameters": 1 - parameters_after(graph.shapes, step) / baseline.parameters,
    }
    return config.reaches_targets(gone)


def _enough(graph: PruningGraph, layer: str, count: int, macs: Macs, baseline: Baseline, config: LaaspConfig) -> int:
    """The least number of filters up to `count` with which a prune of the layer reaches the targets, or `count`."""
    group = graph.layers[layer]
    width = group.filters // group.blocks

    def reaches(filters: int) -> bool:
        some = [block * width + index for block in range(group.blocks) for index in range(filters // group.blocks)]
        try:
            step = graph.step(layer, some)
        except PruningError:
            return False
        return reaches_targets(graph, macs, baseline, config, step)

    # A prune takes no more than all of the modules that it changes, which costs no plan to know.
    most = sum(macs.per_layer.get(name, 0) for name in group.coupled)
    is_far = 1 - (macs.total - most) / baseline.macs.total < config.flops_reduction - TARGET_ROUNDING
    if not config.exact_target or not config.targets or is_far or not reaches(count):
        return count
    return next(filter(reaches, fewer_filters(group, count, config)), count)


def fewer_filters(group: ChannelGroup, count: int, config: LaaspConfig) -> list[int]:
    """The numbers of filters (rising) below `count` that a prune of the layer may take."""
    unit = math.lcm(group.blocks, config.round_to)
    fewer = (group.filters - kept for kept in range(unit, group.filters, unit))
    return sorted(filters for filters in fewer if filters < count)


def tasks_of(proposals: Sequence[Proposal]) -> list[LossTask]:
    """The tasks that measure the proposals. The last task is the current network."""
    tasks = [
        LossTask(proposal.candidate.name, proposal.step, proposal.mask, proposal.made_up) for proposal in proposals
    ]
    return [*tasks, NETWORK_BEFORE]


def ranking_of(proposals: Sequence[Proposal], losses: Sequence[MeasuredLoss]) -> Ranking:
    """The proposals ranked by what was measured for them, in the order of `tasks_of`; the network's own loss is left
    out."""
    return Ranking(
        [
            CandidateLoss(candidate=proposal.candidate, measured=measured)
            for proposal, measured in zip(proposals, losses[:-1], strict=True)
        ]
    )


def _identity(removal: Removal) -> Hashable:
    """A key that is equal for prunes that remove the same channels everywhere, whichever layer proposed them."""
    return frozenset((side, frozenset(channels)) for side, channels in removal.items() if channels)


def _also(proposal: Proposal, layer: str, proposers: Sequence[str]) -> Proposal:
    also = (*proposal.candidate.also, *((layer, name) for name in proposers))
    return replace(proposal, candidate=replace(proposal.candidate, also=also))


def _picks(scores: Mapping[str, torch.Tensor], count: int, blocks: int) -> dict[tuple[int, ...], list[str]]:
    """Sets of filters -> the criteria that chose them, in the pool's order."""
    picks: dict[tuple[int, ...], list[str]] = {}
    for name, of_filters in scores.items():
        picks.setdefault(criteria.lowest(of_filters, count, blocks), []).append(name)
    return picks
