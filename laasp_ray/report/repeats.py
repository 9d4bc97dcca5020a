"""Several runs that differ only in their seed: the mean and spread of their results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from laasp_ray.config import RunConfig
from laasp_ray.records import Metrics
from laasp_ray.report.tables import table_lines
from laasp_ray.run.metrics import form_of, label_of

_BEST = "best_"
"""Begins the figure of the best epoch of the final training; the other metrics are of the last one."""
_FLOPS = "flops_reduction"


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
    """The figures of a run's `finish` event by name: the test metrics of the pruned network, the user's own among
    them, and the FLOPs reduction reached. The primary metric comes first, then that of the best epoch, as `best_top1`
    for example, unless there was no final training.
    """
    metrics = Metrics(**summary["metrics"])
    (first, value), *others = [*metrics.named.items(), ("loss", metrics.loss)]
    figures = {first: value}
    if summary["best"] is not None:
        name, best = Metrics(**summary["best"]["metrics"]).primary
        figures[_BEST + name] = best
    figures |= {**dict(others), _FLOPS: summary["flops_reduction"]}
    return {figure: float(value) for figure, value in figures.items()}


def collected(runs: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The stored content: each run's figures by its name, and the spread of each figure over the runs."""
    first = next(iter(runs.values()), {})
    figures = [figure for figure in first if all(figure in run for run in runs.values())]
    spread = {figure: asdict(spread_of([run[figure] for run in runs.values()])) for figure in figures}
    return {"runs": {name: dict(run) for name, run in runs.items()}, "spread": spread}


def table(content: Mapping[str, Any]) -> str:
    """The content that `collected` returns, as text: a line for each run, then the lines of the spread."""
    spread = content["spread"]
    rows: list[tuple[str, ...]] = [("", *(_heading(figure) for figure in spread))]
    rows += [(name, *(_cell(figure, run[figure]) for figure in spread)) for name, run in content["runs"].items()]
    for part in ("mean", "std", "min", "max"):
        rows.append((part, *(_cell(figure, values[part]) for figure, values in spread.items())))
    return "\n".join(table_lines(rows))


def _heading(figure: str) -> str:
    if figure == _FLOPS:
        return "FLOPs reduction"
    metric = figure.removeprefix(_BEST)
    return label_of(metric) if metric == figure else f"best {label_of(metric)}"


def _cell(figure: str, value: float | None) -> str:
    if value is None:
        return "-"
    form = "{:.2%}" if figure == _FLOPS else form_of(figure.removeprefix(_BEST))
    return form.format(value)
