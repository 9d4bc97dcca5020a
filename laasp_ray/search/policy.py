"""The choice: the lowest loss wins. Ties go to the earlier layer, then to the pool's order.

A loss that is not finite never wins.
"""

from __future__ import annotations

import math

from laasp_ray.errors import SearchError
from laasp_ray.records import CandidateLoss, Decision, Ranking


def choose(ranking: Ranking) -> CandidateLoss:
    """The best candidate. Raises SearchError if no loss is finite."""
    if not ranking or not math.isfinite(ranking[0].loss):
        failed = next((entry for entry in ranking if entry.error), None)
        if failed is not None:
            raise SearchError(f"no candidate's loss could be measured; {failed.candidate.name}: {failed.error}")
        raise SearchError(
            f"none of the {len(ranking)} candidates has a finite loss: the network's weights have probably diverged; "
            "lower train.learning_rate or start from an earlier checkpoint"
        )
    return ranking[0]


def decide(ranking: Ranking, *, iteration: int, loss_before: float) -> Decision:
    """The decision of iteration `iteration` (from 1). `loss_before` is the network's loss on the calibration set before
    the prune.
    """
    best = choose(ranking)
    return Decision(
        iteration=iteration,
        layer=best.layer,
        criterion=best.criterion,
        filters=best.filters,
        loss=best.loss,
        loss_before=loss_before,
        flops_reduction=best.flops_reduction,
        also=best.candidate.also,
    )
