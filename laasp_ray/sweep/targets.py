"""The runs of a sweep over targets: one for each, of which the deepest makes the prunes that all share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from laasp_ray.config import FilterPruneConfig, RunConfig
from laasp_ray.errors import ConfigError


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
    prune = config.prune
    if not isinstance(prune, FilterPruneConfig):
        raise ConfigError(f"a sweep over FLOPs needs a method that removes filters, not {prune.method}")
    if not flops_reductions:
        raise ConfigError("a sweep needs one target at least, such as --flops-reduction 0.3 0.5")
    targets = sorted(flops_reductions)
    wrong = [target for target in targets if not 0 < target < 1]
    if wrong:
        raise ConfigError(f"--flops-reduction {wrong[0]:g} is no share of FLOPs; it must be above 0 and below 1")
    twice = [target for target, following in itertools.pairwise(targets) if target == following]
    if twice:
        raise ConfigError(f"--flops-reduction {twice[0]:g} is given twice; each target is one run of the sweep")
    base, mark, query = config.storage.partition("?") if "://" in config.storage else (config.storage, "", "")
    storage = f"{base.rstrip('/')}/{config.name}{mark}{query}"
    runs = [
        replace(config, name=f"flops-{target:g}", storage=storage, prune=replace(prune, flops_reduction=target))
        for target in targets
    ]
    return TargetRuns(runs[-1], tuple(runs[:-1]))
