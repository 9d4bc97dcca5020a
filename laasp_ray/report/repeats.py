"""Several runs that differ in their seed only: what they came to, mean and spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from laasp_ray.config import RunConfig
from laasp_ray.report.summary import table_lines

FIGURES = ("top1", "top5", "loss", "flops_reduction")


@dataclass(frozen=True)
class Spread:
    """`std` is the sample standard deviation (n - 1), None of a single value."""

    mean: float
    std: float | None
    min: float
    max: float


def runs_of(config: RunConfig, count: int) -> list[RunConfig]:
    """`count` runs of `config`, with the seeds from its own on, under names of their own."""
    seeds = range(config.seed, config.seed + count)
    return [replace(config, name=f"{config.name}-seed{seed}", seed=seed) for seed in seeds]


def spread_of(values: Sequence[float]) -> Spread:
    """Raises ValueError if there are no values."""
    if not values:
        raise ValueError("no values to tell the spread of")
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), std, min(values), max(values))


def figures_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """FIGURES of a run's `finish` event: test metrics of the pruned network, and the FLOPs reduction reached."""
    values = {**summary["metrics"], "flops_reduction": summary["flops_reduction"]}
    return {figure: float(values[figure]) for figure in FIGURES}


def collected(runs: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What is stored: each run's figures by its name, and the spread of each figure over the runs."""
    spread = {figure: asdict(spread_of([run[figure] for run in runs.values()])) for figure in FIGURES}
    return {"runs": {name: dict(run) for name, run in runs.items()}, "spread": spread}


def table(content: Mapping[str, Any]) -> str:
    """What `collected` gives, as text: a line for each run, then those of the spread."""
    rows: list[tuple[str, ...]] = [("", "top-1", "top-5", "loss", "FLOPs reduction")]
    rows += [(name, *_cells(run)) for name, run in content["runs"].items()]
    for part in ("mean", "std", "min", "max"):
        rows.append((part, *_cells({figure: content["spread"][figure][part] for figure in FIGURES})))
    return "\n".join(table_lines(rows))


def _cells(values: Mapping[str, float | None]) -> list[str]:
    return [
        "-" if (value := values[figure]) is None else f"{value:.4f}" if figure == "loss" else f"{value:.2%}"
        for figure in FIGURES
    ]
