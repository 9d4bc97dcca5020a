"""What pruning will take, as a method counts it before a run: for the dry run (planning/)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from laasp_ray.config import FilterPruneConfig

Rows = tuple[tuple[str, str], ...]
"""Lines of a table: what each is of, and what it says."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What pruning will take, besides the training before and after it.

    `fine_tunes` is how many of the `iterations` are followed by one. `passes` is what an iteration measures, in forward
    passes of the unpruned network over the calibration images; `preparing_s` what it took to make it ready here; both 0
    where no losses are measured. `rows` and `assumptions` say in words what is pruned and what is taken for granted.
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
    """The rows of an estimate for targets: its iterations, each of which (or each candidate) `removes` a share of FLOPs
    on average; a method's own rows; its fine-tunes."""
    targets = config.targets
    text = f"about {iterations}: " + " and ".join(f"{share:.2%} of {of}" for of, share in targets.items())
    text += f", {removes:.2%}{'' if list(targets) == ['FLOPs'] else ' of FLOPs'} {each}"
    text += f"; at most {config.iterations}" if config.iterations else ""
    tuned = f"about {fine_tunes}, epochs each: {config.fine_tune_epochs}"
    return (("iterations", text), *rows, ("fine-tunings", tuned))


def assumed(config: FilterPruneConfig, own: Iterable[str]) -> tuple[str, ...]:
    """What an estimate for targets takes for granted, and what is a method's own."""
    first = "the network stays as slow as it is unpruned: later iterations and epochs are faster"
    return (first, *own, *(("latency falls as FLOPs do",) if "latency" in config.targets else ()))
