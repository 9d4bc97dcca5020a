"""What a sweep is asked for, checked before anything starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from laasp_ray.config import FilterPruneConfig, RunConfig
from laasp_ray.errors import ConfigError
from laasp_ray.run.metrics import TOP1, Measure

TARGETS, MAX_DROP, LATENCY, SPACE = "targets", "max-drop", "latency", "space"


@dataclass(frozen=True)
class Targets:
    """A run for each share of the unpruned network's FLOPs that is to go, shallowest first."""

    flops_reductions: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {"kind": TARGETS, "flops_reductions": list(self.flops_reductions)}


@dataclass(frozen=True)
class MaxDrop:
    """The largest reduction of FLOPs whose top-1 after its final training is at most `points` below the base's.

    `points` are of 100%. The base is `base_top1`, %; None: the network just before its first prune. With a loss of the
    user's own `points` are in the unit of its primary metric, or of the loss, and `base_top1` is None.
    """

    points: float
    base_top1: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"kind": MAX_DROP, "points": self.points, "base_top1": self.base_top1}


@dataclass(frozen=True)
class WithinLatency:
    """The best accuracy of a network whose measured median latency is at most `ms` milliseconds a batch."""

    ms: float

    def to_json(self) -> dict[str, Any]:
        return {"kind": LATENCY, "ms": self.ms}


@dataclass(frozen=True)
class SpaceSearch:
    """`trials` runs for each target, whose other settings a searcher chooses from `space` (sweep/space.py)."""

    flops_reductions: tuple[float, ...]
    space: Mapping[str, Mapping[str, Any]]
    trials: int

    def to_json(self) -> dict[str, Any]:
        plain = {key: dict(entry) for key, entry in self.space.items()}
        return {
            "kind": SPACE,
            "flops_reductions": list(self.flops_reductions),
            "space": plain,
            "trials": self.trials,
        }


Goal = Targets | MaxDrop | WithinLatency | SpaceSearch


def checked_targets(flops_reductions: Sequence[float]) -> tuple[float, ...]:
    """The targets, shallowest first. Raises ConfigError, naming it, for one that is no share or is given twice, and
    for none at all.
    """
    if not flops_reductions:
        raise ConfigError("a sweep needs one target at least, such as --flops-reduction 0.3 0.5")
    targets = sorted(flops_reductions)
    wrong = [target for target in targets if not 0 < target < 1]
    if wrong:
        raise ConfigError(f"--flops-reduction {wrong[0]:g} is no share of FLOPs; it must be above 0 and below 1")
    twice = [target for target, following in itertools.pairwise(targets) if target == following]
    if twice:
        raise ConfigError(f"--flops-reduction {twice[0]:g} is given twice; each target is one run of the sweep")
    return tuple(targets)


def check_goal(goal: Goal, config: RunConfig, test_images: int, measure: Measure = TOP1) -> None:
    """Raises ConfigError for a goal that no sweep of `config` can have, naming the value and what would do. `measure`
    is what its networks are compared by.
    """
    if isinstance(goal, MaxDrop):
        if list(config.prune.targets) != ["FLOPs"]:
            raise ConfigError(
                "--max-drop looks along FLOPs: give --flops-reduction, the deepest to look at, and no other"
            )
        if measure.is_top1:
            _check_points(goal.points, goal.base_top1, test_images)
        elif goal.base_top1 is not None:
            raise ConfigError(
                f"--base-top1 is of top-1, and this task's networks are compared by {measure.label}: leave it out, and "
                "the base is the network just before its first prune"
            )
        elif not (math.isfinite(goal.points) and goal.points > 0):
            raise ConfigError(f"--max-drop {goal.points:g} must be above 0, in the unit of {measure.label}")
    if isinstance(goal, WithinLatency) and not goal.ms > 0:
        raise ConfigError(f"--latency-ms {goal.ms:g} must be above 0")
    if isinstance(goal, SpaceSearch) and goal.trials < 1:
        raise ConfigError(f"--trials {goal.trials} must be at least 1")
    if isinstance(goal, MaxDrop | WithinLatency) and config.train.epochs == config.train.prune_epoch:
        raise ConfigError(
            f"train.epochs is {config.train.epochs}, and pruning begins after the last: a sweep that looks for a "
            "network by its accuracy needs epochs of final training; raise train.epochs"
        )


def _check_points(points: float, base_top1: float | None, test_images: int) -> None:
    """The checks of a drop of top-1."""
    step = 100 / test_images
    if not 0 < points < 100:
        raise ConfigError(f"--max-drop {points:g} must be above 0 and below 100 points of top-1")
    if points < step:
        raise ConfigError(
            f"--max-drop {points:g} is less than one of the {test_images} test images ({step:.3g} points): no "
            f"prune can be seen to keep to it; give at least {math.ceil(step * 1000) / 1000:g}"
        )
    if base_top1 is not None and not points < base_top1 <= 100:
        raise ConfigError(f"--base-top1 {base_top1:g} must be above --max-drop {points:g}, and 100 at most")


def filter_prune(config: RunConfig) -> FilterPruneConfig:
    """The section `prune`. Raises ConfigError for a method that has no target of FLOPs."""
    if not isinstance(config.prune, FilterPruneConfig):
        raise ConfigError(f"a sweep over FLOPs needs a method that removes filters, not {config.prune.method}")
    return config.prune


def sharing(config: RunConfig) -> RunConfig:
    """The config with which runs to several targets make the same prunes: without exact targets. Raises ConfigError as
    `filter_prune` does.
    """
    return replace(config, prune=replace(filter_prune(config), exact_target=False))


def inside(config: RunConfig, name: str, **prune: Any) -> RunConfig:
    """A run of the sweep of `config`: `name` in the sweep's folder, with changes of its section `prune`."""
    base, mark, query = config.storage.partition("?") if "://" in config.storage else (config.storage, "", "")
    storage = f"{base.rstrip('/')}/{config.name}{mark}{query}"
    if "flops_reduction" in prune:  # the only target then
        prune = {"parameters_reduction": 0.0, "latency_reduction": 0.0, **prune}
    return replace(config, name=name, storage=storage, prune=replace(filter_prune(config), **prune))
