"""LAASP: among all layers and a pool of criteria, the prune that costs the network least loss.

Source: Ghimire, Lee, Kim, Image and Vision Computing 136 (2023) 104745.
"""

from __future__ import annotations

import logging
from collections import Counter

from laasp_ray.criteria import looks_at_data
from laasp_ray.methods.base import IterationContext, IterationResult, PruningMethod
from laasp_ray.methods.joint import with_next_best
from laasp_ray.records import CandidateLoss, MeasuredLoss, Ranking
from laasp_ray.search.activations import ImportanceRequest
from laasp_ray.search.candidates import propose, ranking_of, tasks_of
from laasp_ray.search.policy import decide

logger = logging.getLogger(__name__)


class Laasp(PruningMethod):
    """The cheapest prune of one layer."""

    def iterate(self, context: IterationContext) -> IterationResult:
        """Proposes, measures and chooses. With `prune.prunes_per_iteration` the next best candidates go with the best
        (joint.py). Raises SearchError when there is nothing to propose (ExhaustedError) or nothing to choose.
        """
        config, graph, macs = context.config, context.graph, context.macs
        context.clock.lap("graph")
        network = context.scored
        given = {
            name: context.executor.importance(network, ImportanceRequest.of(graph.layers, name, config))
            for name in config.criteria
            if looks_at_data(name)
        }
        proposals = propose(context.model, graph, macs, context.baseline, config, given)
        context.clock.lap("propose")
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

        results = context.executor.measure(network, tasks_of(proposals), on_result, on_share)
        ranking = ranking_of(proposals, results)
        _say_copied(ranking)
        decision, step = with_next_best(
            context, decide(ranking, iteration=context.iteration, loss_before=results[-1].loss), ranking
        )
        context.clock.lap("evaluate")
        return IterationResult(decision=decision, step=step, ranking=ranking, seconds=context.clock.seconds)


def _say_copied(ranking: Ranking) -> None:
    reasons = Counter(entry.copied for entry in ranking if entry.copied)
    if reasons:
        logger.info(
            "%d of %d candidates were measured on pruned copies, which is slower than masks: %s",
            reasons.total(),
            len(ranking),
            "; ".join(f"{count} because {reason}" for reason, count in reasons.most_common(3)),
        )
