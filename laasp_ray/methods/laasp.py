"""LAASP: of all layers and a pool of criteria, the prune that raises the network's loss least.

Source: Ghimire, Lee, Kim, Image and Vision Computing 136 (2023) 104745.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from laasp_ray import criteria
from laasp_ray.config import LaaspConfig, RunConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.criteria import looks_at_data
from laasp_ray.criteria.obs import NAME as OBS
from laasp_ray.data.ordering import derive_seed
from laasp_ray.errors import ConfigError, LaaspError
from laasp_ray.methods.base import IterationContext, IterationResult, PruningMethod
from laasp_ray.methods.estimate import Estimate, assumed, described
from laasp_ray.methods.joint import with_next_best
from laasp_ray.methods.preparation import Preparation, UnprunedNetwork, prepare_filters, section_of
from laasp_ray.models.copying import deep_copy
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.plan import parameters_after
from laasp_ray.records import CandidateLoss, MeasuredLoss, Ranking
from laasp_ray.search.activations import ImportanceRequest, check_request
from laasp_ray.search.candidates import Proposal, counts_of, propose, ranking_of, tasks_of
from laasp_ray.search.engine import BranchPoints, untraced_by
from laasp_ray.search.policy import decide

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LaaspEstimate(Estimate):
    """`proposals` and `candidates` (distinct proposals) count those of the first iteration. `removes` is the mean share
    of FLOPs that a candidate removes.
    """

    proposals: int
    candidates: int
    removes: float


class Laasp(PruningMethod[LaaspConfig]):
    """LAASP: each iteration makes the prune of one layer with the lowest loss."""

    config_class = LaaspConfig

    def prepare(self, network: UnprunedNetwork) -> Preparation:
        config, model, prune = network.config, network.model, section_of(network.config, LaaspConfig)
        for name in prune.criteria:
            criteria.get(name)
        prepared, graph = prepare_filters(network, max_pruned=prune.max_pruned)
        _check_criteria(prune, graph, model)
        if prune.prunes_per_iteration > 1 and config.search.racing == "on":
            logger.warning(
                "prune.prunes_per_iteration is %d, but a race drops most candidates, and those that it drops do not "
                "count: set search.racing=off to have as many",
                prune.prunes_per_iteration,
            )
        for name in _of_data(prune):
            check_request(deep_copy(model), network.example_input, ImportanceRequest.of(graph.layers, name, prune))
        return prepared

    def iterate(self, context: IterationContext[LaaspConfig]) -> IterationResult:
        """Proposes candidates, measures their losses and chooses the best.

        With `prune.prunes_per_iteration` the next best candidates are pruned too (joint.py). Raises ExhaustedError if
        there is nothing to propose, SearchError if there is nothing to choose.
        """
        config, graph, macs = context.config, context.graph, context.macs
        context.clock.lap("graph")
        network = context.scored
        given: dict[str, Mapping[str, torch.Tensor]] = {
            name: context.executor.importance(network, ImportanceRequest.of(graph.layers, name, config))
            for name in _of_data(config)
        }
        if OBS in config.criteria:
            counts = counts_of(graph, macs, context.baseline, config)
            given[OBS] = context.compensator.obs_scores(context.model, graph, counts)
        proposals = propose(
            context.model, graph, macs, context.baseline, config, given, context.memory.scores, context.made_up
        )
        context.clock.lap("propose")
        results = _measure(context, network, proposals)
        ranking = ranking_of(proposals, results)
        _say_copied(ranking)
        decision, removal = with_next_best(
            context,
            decide(ranking, iteration=context.iteration, loss_before=results[-1].loss),
            ranking,
            scores=lambda name, layer: _scores(context, given, name, layer),
        )
        if decision.further:  # the network changes by more than the race's choice
            context.memory.race.forget()
        made_up, loss, details = context.if_it_helps(removal, decision.loss)
        decision = replace(decision, loss=loss)
        context.clock.lap("evaluate")
        step, weights = context.carried_out(removal, made_up)
        context.clock.lap("compensate")
        return IterationResult(
            decision=decision,
            step=step,
            weights=weights,
            ranking=ranking,
            details=details,
            seconds=context.clock.seconds,
        )

    def estimate(self, network: UnprunedNetwork, prepared: Preparation, calibration_images: int) -> LaaspEstimate:
        config, prune = network.config, section_of(network.config, LaaspConfig)
        started = time.perf_counter()
        graph, macs = network.graph(), count_macs(network.model, network.example_input)
        drawn = {name: _drawn_scores(graph, name, config.seed) for name in (*_of_data(prune), *_obs(prune))}
        proposals = propose(network.model, graph, macs, prepared.baseline, prune, drawn)
        preparing = time.perf_counter() - started
        branch_points = BranchPoints(
            deep_copy(network.model).eval(), network.example_input, untraced_by(network.task) or None
        )
        *costs, whole = (branch_points.cost(task).own for task in tasks_of(proposals))
        removes = sum(proposal.candidate.flops_reduction for proposal in proposals) / len(proposals)
        left = sum(parameters_after(graph.shapes, proposal.step) for proposal in proposals) / len(proposals)
        each = {"FLOPs": removes, "parameters": 1 - left / prepared.baseline.parameters, "latency": removes}
        prunes = max(share / each[of] for of, share in prune.targets.items())
        iterations = max(1, math.ceil(prunes / prune.prunes_per_iteration - 1e-9))
        iterations = min(iterations, prune.iterations or iterations)
        between = max(1, math.ceil(prune.fine_tune_every / (removes * prune.prunes_per_iteration) - 1e-9))
        fine_tunes = iterations // between if prune.fine_tune_epochs else 0
        # The other passes are: the current network, its BatchNorm statistics, the criteria of data, and two for several
        # prunes together.
        passes = sum(costs) / whole
        passes += 1 + config.search.reestimate_batchnorm + len(drawn) + 2 * (prune.prunes_per_iteration > 1)
        passes += 2 * (prune.compensate != "off") + prune.reestimate_batchnorm
        count = sum(1 + len(proposal.candidate.also) for proposal in proposals)
        together = f", {prune.prunes_per_iteration} together" if prune.prunes_per_iteration > 1 else ""
        rows = [
            (
                "candidates",
                f"{count} proposals an iteration, {len(proposals)} distinct ({len(prepared.baseline.filters)} layers, "
                f"{len(prune.criteria)} criteria)",
            ),
            (
                "evaluated",
                f"{calibration_images:,} images for each candidate: {len(proposals) * calibration_images:,} an "
                f"iteration, worth {passes:.0f} forward passes over them",
            ),
        ]
        return LaaspEstimate(
            iterations=iterations,
            fine_tunes=fine_tunes,
            passes=passes,
            preparing_s=preparing,
            rows=described(prune, iterations, removes, f"a candidate{together}", rows, fine_tunes),
            assumptions=assumed(prune, _assumptions(config, prune)),
            proposals=count,
            candidates=len(proposals),
            removes=removes,
        )


def _measure(
    context: IterationContext[LaaspConfig], network: NetworkState, proposals: Sequence[Proposal]
) -> list[MeasuredLoss]:
    """The losses of the proposals, and of the network, last. `context.on_candidate` gets each, and the number done."""
    done = reported = 0

    def on_result(position: int, result: MeasuredLoss) -> None:
        nonlocal done
        if position < len(proposals):
            done += 1
            entry = CandidateLoss(candidate=proposals[position].candidate, measured=result)
            context.on_candidate(max(done, reported), len(proposals), entry)
            if result.error:
                logger.warning("%s is left out: %s", proposals[position].candidate.name, result.error)

    def on_share(share: float) -> None:
        nonlocal reported
        if max(done, reported) < (so_far := int(share * len(proposals))) < len(proposals):
            reported = so_far
            context.on_candidate(so_far, len(proposals), None)

    return context.executor.measure(network, tasks_of(proposals), on_result, on_share, memory=context.memory.race)


def _of_data(config: LaaspConfig) -> list[str]:
    return [name for name in config.criteria if looks_at_data(name)]


def _obs(config: LaaspConfig) -> list[str]:
    return [OBS] if OBS in config.criteria else []


def _check_criteria(config: LaaspConfig, graph: PruningGraph, model: nn.Module) -> None:
    """Scores one layer with each criterion, so that a user's function fails before hours of training and not after."""
    layer = next(iter(graph.layers))
    for name in config.criteria:
        if not looks_at_data(name) and name != OBS:
            try:
                criteria.scores(name, model.get_submodule(layer))
            except LaaspError as error:
                raise ConfigError(f"prune.criteria, tried on layer {layer}: {error}") from error


def _scores(
    context: IterationContext[LaaspConfig], given: Mapping[str, Mapping[str, torch.Tensor]], name: str, layer: str
) -> torch.Tensor:
    if name in given:
        return given[name][layer]
    return context.memory.scores.scores([name], layer, context.model.get_submodule(layer))[name]


def _drawn_scores(graph: PruningGraph, criterion: str, seed: int) -> dict[str, torch.Tensor]:
    """Random scores instead of those from images. They differ from the scores of criteria of weights."""
    return {
        layer: torch.rand(
            group.filters, generator=torch.Generator().manual_seed(derive_seed(seed, f"dry run, {criterion}, {layer}"))
        )
        for layer, group in graph.layers.items()
    }


def _assumptions(config: RunConfig, prune: LaaspConfig) -> Iterator[str]:
    yield "later iterations have as many candidates as the first, and the chosen ones take what all do on average"
    yield "work on candidates goes by multiply-accumulates"
    of_data = _of_data(prune)
    if of_data:
        yield (
            f"{', '.join(of_data)}: its picks, not known before images are looked at, are drawn here; where it agrees "
            "with others there are fewer distinct candidates"
        )
    if prune.prunes_per_iteration > 1:
        yield f"every iteration makes {prune.prunes_per_iteration} prunes"
    if config.search.racing == "on":
        yield "every candidate sees all images: racing drops most of them long before, so iterations are shorter"


def _say_copied(ranking: Ranking) -> None:
    reasons = Counter(entry.copied for entry in ranking if entry.copied)
    if reasons:
        logger.info(
            "%d of %d candidates were measured on pruned copies, which is slower than masks: %s",
            reasons.total(),
            len(ranking),
            "; ".join(f"{count} because {reason}" for reason, count in reasons.most_common(3)),
        )
