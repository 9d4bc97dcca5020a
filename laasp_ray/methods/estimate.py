"""The cost of pruning, which a method estimates before a run, for the dry run (planning/)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from laasp_ray.config import FilterPruneConfig

Rows = tuple[tuple[str, str], ...]
"""Rows of a table: label and text."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of pruning, without the training before and after it.

    `fine_tunes` is the number of iterations that a fine-tune follows. `passes` is the work of the measurements of an
    iteration, in forward passes of the unpruned network over the calibration images. `preparing_s` is the seconds that
    the preparation of these measurements took here. Both are 0 if no losses are measured. `rows` describe what is
    pruned, and `assumptions` list the assumptions.
    """

    iterations: int
    fine_tunes: int
    passes: float = 0.0
    preparing_s: float = 0.0
    rows: Rows = ()
    assumptions: tuple[str, ...] = ()


def described(
    config: FilterPruneConfig,
    iterations: int,
    removes: float,
    each: str,
    rows: Iterable[tuple[str, str]],
    fine_tunes: int,
) -> Rows:
    """The rows of an estimate for targets: the iterations, a method's own `rows`, and the fine-tunes.

    `removes` is the mean share of FLOPs that each iteration or candidate removes; `each` names which.
    """
    targets = config.targets
    text = f"about {iterations}: " + " and ".join(f"{share:.2%} of {of}" for of, share in targets.items())
    text += f", {removes:.2%}{'' if list(targets) == ['FLOPs'] else ' of FLOPs'} {each}"
    text += f"; at most {config.iterations}" if config.iterations else ""
    tuned = f"about {fine_tunes}, epochs each: {config.fine_tune_epochs}"
    return (("iterations", text), *rows, ("fine-tunings", tuned))


def assumed(config: FilterPruneConfig, own: Iterable[str]) -> tuple[str, ...]:
    """The assumptions of an estimate for targets, with a method's `own`."""
    first = "the network stays as slow as it is unpruned: later iterations and epochs are faster"
    return (first, *own, *(("latency falls as FLOPs do",) if "latency" in config.targets else ()))
