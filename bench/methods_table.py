"""The rows of bench/methods.py: from a run's journal, in a file, and as tables."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from laasp_ray.report.repeats import Spread, spread_of
from laasp_ray.store.journal import Event

COLUMNS = (
    "method",
    "seeds",
    "top-1",
    "loss",
    "FLOPs",
    "parameters",
    "iterations",
    "fine_tunes",
    "s an iteration",
    "s an epoch",
    "s in all",
)


@dataclass(frozen=True)
class Row:
    """A finished run. Shares are from 0 to 1; `iteration_seconds` and `epoch_seconds` are means, `seconds` all of
    it."""

    method: str
    target: float
    seed: int
    top1: float
    loss: float
    top1_before: float
    loss_before: float
    flops_reduction: float
    parameters_reduction: float
    parameters: int
    iterations: int
    fine_tunes: int
    iteration_seconds: float
    epoch_seconds: float
    seconds: float

    @property
    def key(self) -> tuple[str, float, int]:
        return self.method, self.target, self.seed


def row_of(method: str, target: float, seed: int, events: Sequence[Event]) -> Row:
    """`events` are those of a finished run, from given weights or from scratch."""

    def data_of(name: str) -> list[dict]:
        return [dict(event.data) for event in events if event.name == name]

    before = [*data_of("baseline"), *data_of("training_phase")][0]  # the second: what it was trained to
    (finish,), iterations = data_of("finish"), data_of("iteration")
    return Row(
        method=method,
        target=target,
        seed=seed,
        top1=finish["metrics"]["top1"],
        loss=finish["metrics"]["loss"],
        top1_before=before["metrics"]["top1"],
        loss_before=before["metrics"]["loss"],
        flops_reduction=finish["flops_reduction"],
        parameters_reduction=1 - finish["parameters"] / finish["parameters_unpruned"],
        parameters=finish["parameters"],
        iterations=len(iterations),
        fine_tunes=sum(training_phase["phase"] == "fine-tune" for training_phase in data_of("training_phase")),
        iteration_seconds=statistics.fmean(iteration["seconds"]["total"] for iteration in iterations),
        epoch_seconds=statistics.fmean(epoch["seconds"] for epoch in data_of("epoch")),
        seconds=finish["seconds"],
    )


def read_rows(path: Path, settings: Sequence[str]) -> list[Row]:
    """The rows that are there already. Raises SystemExit if they were made with other settings."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["settings"] != list(settings):
        raise SystemExit(
            f"{path} has rows made with the settings {content['settings']}, these are {list(settings)}: "
            "give the same --set, or another --json"
        )
    return [Row(**row) for row in content["rows"]]


def write_rows(path: Path, machine: str, settings: Sequence[str], rows: Sequence[Row]) -> None:
    """Written aside and moved: who is cut off keeps the rows from before."""
    content = {"machine": machine, "settings": list(settings), "rows": [dataclasses.asdict(row) for row in rows]}
    aside = path.with_name(f".{path.name}.aside")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)


def line_of(row: Row) -> str:
    """A finished run, for whoever watches."""
    return (
        f"{row.method}, {row.target:.0%}, seed {row.seed}: top-1 {row.top1:.2%}, loss {row.loss:.4f}, "
        f"FLOPs -{row.flops_reduction:.2%}, parameters -{row.parameters_reduction:.2%}; {row.iterations} iterations of "
        f"{row.iteration_seconds:.1f} s, {row.fine_tunes} fine-tunings, {row.epoch_seconds:.1f} s an epoch, "
        f"{row.seconds:.0f} s in all"
    )


def table(rows: Sequence[Row], target: float, order: Sequence[str]) -> str:
    """Markdown: a line for each method of `order` that has rows at `target`, means over seeds, with the sample standard
    deviation where it is named; under it the network before pruning."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    at_target = [row for row in rows if row.target == target]
    for method in order:
        if found := [row for row in at_target if row.method == method]:
            lines.append(f"| {' | '.join(_cells(method, found))} |")
    before = {(row.top1_before, row.loss_before) for row in at_target}
    lines += [f"| before pruning | | {top1:.2%} | {loss:.4f} |" + " |" * (len(COLUMNS) - 4) for top1, loss in before]
    return "\n".join(lines)


def _cells(method: str, rows: Sequence[Row]) -> list[str]:
    def mean(name: str) -> float:
        return statistics.fmean(getattr(row, name) for row in rows)

    return [
        method,
        str(len(rows)),
        _with_spread(spread_of([row.top1 for row in rows]), ".2%"),
        _with_spread(spread_of([row.loss for row in rows]), ".4f"),
        f"-{mean('flops_reduction'):.2%}",
        f"-{mean('parameters_reduction'):.2%}",
        f"{mean('iterations'):.1f}",
        f"{mean('fine_tunes'):.1f}",
        f"{mean('iteration_seconds'):.1f}",
        f"{mean('epoch_seconds'):.1f}",
        f"{mean('seconds'):.0f}",
    ]


def _with_spread(spread: Spread, form: str) -> str:
    return f"{spread.mean:{form}}" + ("" if spread.std is None else f" ± {spread.std:{form}}")


def verdict(rows: Sequence[Row], target: float, figure: str, ours: str, compared: Collection[str]) -> str:
    """Whether the method `ours` is best of the `compared` methods at `target`, by `figure`: top1 or loss.

    It is compared with the best of the others. Tied: the means are no further apart than the larger of the two sample
    standard deviations.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.target == target and row.method in compared:
            values.setdefault(row.method, []).append(getattr(row, figure))
    if ours not in values or len(values) < 2:
        return f"{figure} at {target:.0%}: nothing to compare {ours} with"
    spreads = {method: spread_of(found) for method, found in values.items()}
    sign = 1 if figure == "top1" else -1
    rival = max((method for method in spreads if method != ours), key=lambda method: sign * spreads[method].mean)
    ahead = sign * (spreads[ours].mean - spreads[rival].mean)
    spread = max(spreads[method].std or 0.0 for method in (ours, rival))
    tied = abs(ahead) <= spread
    place = "tied with the" if tied else "ahead of the" if ahead > 0 else "behind the"
    return (
        f"{figure} at {target:.0%}: {ours} {spreads[ours].mean:.4f} is {place} best of {len(values) - 1} others, "
        f"{rival} {spreads[rival].mean:.4f}: {abs(ahead):.4f} apart, spread {spread:.4f}"
    )
