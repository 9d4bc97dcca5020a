"""The runs of a sweep over targets: one for each, of which the deepest makes the prunes that all share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from laasp_ray.config import RunConfig
from laasp_ray.sweep.goals import checked_targets, filter_prune, inside


@dataclass(frozen=True)
class TargetRuns:
    """`deepest` prunes to the deepest target. `others` begin with what it did, shallowest first (sweep/trajectory.py).
    All are folders in the sweep's folder, which has the name and the storage of the sweep's config.
    """

    deepest: RunConfig
    others: tuple[RunConfig, ...]


def runs_for(config: RunConfig, flops_reductions: Sequence[float]) -> TargetRuns:
    """The runs of a sweep of `config` over targets, shares of the unpruned network's FLOPs that are to go.

    Raises ConfigError, naming it, for a target that is no share or is given twice, for no target at all, and for a
    method that has no target of FLOPs.
    """
    filter_prune(config)
    runs = [
        inside(config, f"flops-{target:.10g}", flops_reduction=target) for target in checked_targets(flops_reductions)
    ]
    return TargetRuns(runs[-1], tuple(runs[:-1]))
