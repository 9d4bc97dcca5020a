"""Several runs that differ only in their seed: the mean and spread of their results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from laasp_ray.config import RunConfig
from laasp_ray.report.tables import table_lines

FIGURES = {
    "top1": "top-1",
    "best_top1": "best top-1",
    "top5": "top-5",
    "loss": "loss",
    "flops_reduction": "FLOPs reduction",
}
"""Reported figure -> its heading. `best_top1` is of the best epoch of the final training; the other metrics are of the
last one. Runs without a final training have no `best_top1`.
"""


@dataclass(frozen=True)
class Spread:
    """`std` is the sample standard deviation (n - 1); None for a single value."""

    mean: float
    std: float | None
    min: float
    max: float


def runs_of(config: RunConfig, count: int) -> list[RunConfig]:
    """`count` runs of `config` with their own names. The seeds count up from that of `config`."""
    seeds = range(config.seed, config.seed + count)
    return [replace(config, name=f"{config.name}-seed{seed}", seed=seed) for seed in seeds]


def spread_of(values: Sequence[float]) -> Spread:
    """Raises ValueError if there are no values."""
    if not values:
        raise ValueError("no values to tell the spread of")
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), std, min(values), max(values))


def figures_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """The FIGURES from a run's `finish` event: test metrics of the pruned network, and the FLOPs reduction reached."""
    values = {**summary["metrics"], "flops_reduction": summary["flops_reduction"]}
    if summary["best"] is not None:
        values["best_top1"] = summary["best"]["metrics"]["top1"]
    return {figure: float(values[figure]) for figure in FIGURES if values.get(figure) is not None}


def collected(runs: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The stored content: each run's figures by its name, and the spread of each figure over the runs."""
    figures = [figure for figure in FIGURES if all(figure in run for run in runs.values())]
    spread = {figure: asdict(spread_of([run[figure] for run in runs.values()])) for figure in figures}
    return {"runs": {name: dict(run) for name, run in runs.items()}, "spread": spread}


def table(content: Mapping[str, Any]) -> str:
    """The content that `collected` returns, as text: a line for each run, then the lines of the spread."""
    spread = content["spread"]
    rows: list[tuple[str, ...]] = [("", *(FIGURES[figure] for figure in spread))]
    rows += [(name, *(_cell(figure, run[figure]) for figure in spread)) for name, run in content["runs"].items()]
    for part in ("mean", "std", "min", "max"):
        rows.append((part, *(_cell(figure, values[part]) for figure, values in spread.items())))
    return "\n".join(table_lines(rows))


def _cell(figure: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if figure == "loss" else f"{value:.2%}"
