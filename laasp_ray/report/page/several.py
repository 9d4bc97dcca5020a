"""The pages of a sweep, and of several runs side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from laasp_ray.report.durations import format_duration
from laasp_ray.report.page import numbers, pareto
from laasp_ray.report.page.document import (
    Cell,
    Chart,
    Document,
    Part,
    Row,
    Table,
    Tile,
    heads,
    name,
    number,
    render,
    text,
)
from laasp_ray.report.page.settings import settings_of
from laasp_ray.report.sweep import SweepRow, comparable, measure_of, pareto_front
from laasp_ray.run.metrics import Measure


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """A sweep as its folder tells it. `goal` is the JSON of what it was asked for (sweep/goals.py). The rest is there
    once it has ended: `best` is a row's name, `rule` makes it so, `said` is the result, `machine` is what latencies
    were measured on.
    """

    name: str
    uri: str
    config: Mapping[str, Any]
    goal: Mapping[str, Any]
    rows: Sequence[SweepRow]
    began: float
    last: float
    finished: bool = False
    best: str | None = None
    rule: str = ""
    said: str = ""
    machine: str = ""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A run of several: its row, when it was begun, and the settings in which it may differ from the others."""

    row: SweepRow
    config: Mapping[str, Any] = field(default_factory=dict)


def sweep_page(record: SweepRecord, now: float | None = None) -> str:
    """The HTML of a sweep's page; `now` is the time of writing, seconds since 1970."""
    best = next((row for row in record.rows if row.name == record.best), None)
    done = sum(row.is_finished for row in record.rows)
    counted = f"{done} of {len(record.rows)} trial{'' if len(record.rows) == 1 else 's'} finished"
    lead = [("Asked:", f"{_asked(record.goal, measure_of(record.rows))}; {_network(record.config)}.")]
    if record.finished:
        lead.append(("Came out:", f"{record.said}."))
        lead.append(("The best is", f"{record.rule}."))
    else:
        lead.append(("So far:", f"{counted}; the best one is chosen at the end."))
    ended = numbers.moment(record.last)
    document = Document(
        heading=record.name,
        kicker=f"laasp_ray sweep in {record.uri}",
        state="finished" if record.finished else f"under way: last event {ended}",
        done=record.finished,
        lead=lead,
        tiles=[] if best is None else _tiles(best),
        parts=[
            _accuracy(record.rows, record.best),
            Part(
                title="Trials",
                lines=[counted + ".", *_notes(record.rows, record.machine)],
                table=_table(record.rows, record.best),
            ),
            _settings(record.config, record.began, record.last),
        ],
    )
    return render(document, time.time() if now is None else now)


def comparison_page(runs: Sequence[Compared], now: float | None = None) -> str:
    """The HTML of a page with several runs side by side."""
    rows = [run.row for run in runs]
    done = sum(row.is_finished for row in rows)
    front = [row.name for row in pareto_front(rows)]
    lead = [("Compared:", f"{len(rows)} runs, {done} of them finished.")]
    if front:
        said = f"no other run is as good in {measure_of(rows).label} and has at most the FLOPs of these"
        lead.append(("On the Pareto front:", f"{', '.join(front)} ({said})."))
    document = Document(
        heading=f"{len(rows)} runs side by side",
        kicker="laasp_ray comparison",
        state="all finished" if done == len(rows) else f"{len(rows) - done} not finished",
        done=done == len(rows),
        lead=lead,
        parts=[
            _accuracy(rows, None),
            Part(title="Comparison", lines=_notes(rows, ""), table=_table(rows, None)),
            _differences(runs),
        ],
    )
    return render(document, time.time() if now is None else now)


def _asked(goal: Mapping[str, Any], measure: Measure) -> str:
    shares = ", ".join(f"{100 * share:g}%" for share in goal.get("flops_reductions", ()))
    match goal.get("kind"):
        case "targets":
            return f"a network for each of {shares} of FLOPs removed"
        case "max-drop":
            base = goal.get("base_top1")
            than = "before the first prune" if base is None else f"{base:g}%"
            return f"the largest reduction of FLOPs {measure.within(goal['points'], than)}"
        case "latency":
            return f"the best network within {goal['ms']:g} ms"
        case "space":
            keys = ", ".join(goal.get("space", {}))
            return f"the best of {goal.get('trials')} trials for each of {shares} of FLOPs removed, over {keys}"
        case other:
            return str(other)


def _network(config: Mapping[str, Any]) -> str:
    model, data, prune = (config.get(key) or {} for key in ("model", "data", "prune"))
    source = data.get("factory") or data.get("format", "unknown")
    return f"{model.get('builder', 'a network')} on {source}, by {prune.get('method', 'unknown')}"


def _tiles(best: SweepRow) -> list[Tile]:
    ms = best.latency_ms
    measure, drop = best.measure, _difference(best)
    return [
        Tile(what="Best trial", value=best.name, before=f"target {best.target}"),
        Tile(
            what="FLOPs",
            value=numbers.change(best.flops_reduction),
            before=f"{numbers.short(best.macs_unpruned)} {numbers.ARROW} {numbers.short(best.macs)}",
        ),
        Tile(
            what=measure.title,
            value=_figure(best, best.score_after),
            before=f"{_figure(best, best.score_before)} before pruning"
            + ("" if drop is None else f" ({_signed(best, drop, ' points')})"),
        ),
        Tile(
            what="Parameters",
            value=_change(best.parameters_unpruned, best.parameters),
            before=f"{numbers.short(best.parameters_unpruned)} {numbers.ARROW} {numbers.short(best.parameters)}",
        ),
        Tile(
            what="Latency",
            value=numbers.NONE if ms is None else numbers.change(1 - ms[1] / ms[0]),
            before="not measured" if ms is None else f"{ms[0]:.2f} {numbers.ARROW} {ms[1]:.2f} ms",
        ),
        Tile(what="Time of work", value=format_duration(best.seconds), note="as a run of its own"),
    ]


def _accuracy(rows: Sequence[SweepRow], best: str | None) -> Part:
    compared, label = {row.name for row in comparable(rows)}, measure_of(rows).label
    without = [row.name for row in rows if row.is_finished and row.name not in compared]
    lines = [f"Not compared by {label}, and so in no plot and on no front: {', '.join(without)}."] if without else []
    return Part(title="Accuracy against cost", lines=lines, charts=_charts(rows, best))


def _charts(rows: Sequence[SweepRow], best: str | None) -> list[Chart]:
    if not any(row.is_finished for row in rows):
        return [Chart(title="Pareto plot", text="Nothing has finished yet.")]
    if not comparable(rows):
        return [Chart(title="Pareto plot", text="No finished run was tested.")]
    line = "Up and to the left is better; the line joins those that none beats in both."
    latency, title = pareto.against_latency(rows, best), measure_of(rows).title
    if latency is None:
        second = Chart(title=f"{title} against latency", text="No latency was measured.")
    else:
        second = Chart(title=f"{title} against latency", text=line, svg=latency)
    return [Chart(title=f"{title} against FLOPs", text=line, svg=pareto.against_flops(rows, best)), second]


def _notes(rows: Sequence[SweepRow], machine: str) -> list[str]:
    notes = [f"Latencies were measured by turns with the unpruned network: {machine}."] if machine else []
    if any(row.shared_seconds for row in rows):
        notes.append("Shared time is that of the run whose prunes a trial began with.")
    return notes


def _table(rows: Sequence[SweepRow], best: str | None) -> Table:
    label = measure_of(rows).label
    chosen, shared = any(row.settings for row in rows), any(row.shared_seconds for row in rows)
    head = heads(
        "run",
        "target",
        "#FLOPs",
        "#FLOPs left",
        "#parameters",
        "#latency, ms",
        f"#{label} before",
        f"#{label} after",
        "#points" if measure_of(rows).is_top1 else "#difference",
        "#own time" if shared else "#time",
        *(["#shared time"] if shared else []),
        "state",
        *(["settings"] if chosen else []),
    )
    return Table(head=head, rows=[_row(row, row.name == best, chosen, shared) for row in rows])


def _row(row: SweepRow, is_best: bool, chosen: bool, shared: bool) -> Row:
    before, after = row.latency_ms or (None, None)
    points = _difference(row)
    own = row.seconds - row.shared_seconds
    cells = [
        name(row.name),
        text(row.target),
        number(numbers.change(row.flops_reduction), row.flops_reduction),
        number(numbers.short(row.macs), row.macs),
        number(numbers.short(row.parameters), row.parameters),
        number(numbers.NONE if after is None else f"{after:.2f} of {before:.2f}", after),
        number(_figure(row, row.score_before), row.score_before),
        number(_figure(row, row.score_after), row.score_after),
        number(numbers.NONE if points is None else _signed(row, points), points),
        number(format_duration(own), own),
    ]
    if shared:
        cells.append(
            number(format_duration(row.shared_seconds) if row.shared_seconds else numbers.NONE, row.shared_seconds)
        )
    cells.append(text("best" if is_best else numbers.cut(row.status)))
    if chosen:
        cells.append(text(numbers.cut(", ".join(f"{key}={value}" for key, value in row.settings.items()))))
    return Row(cells=cells, best=is_best)


def _settings(config: Mapping[str, Any], began: float, last: float) -> Part:
    found = settings_of(config)
    every = [Row(cells=[name(one.key), text(numbers.cut(one.value))]) for one in found.rows]
    return Part(
        title="Settings",
        facts=[("begun", numbers.moment(began)), ("last event", numbers.moment(last))],
        more=Table(head=heads("setting", "value"), rows=every, title=f"All {len(every)} settings of the sweep's runs"),
    )


def _differences(runs: Sequence[Compared]) -> Part:
    """The settings in which the runs differ, a column a run."""
    known = [{one.key: one.value for one in settings_of(run.config).rows} for run in runs]
    keys = list(dict.fromkeys(key for settings in known for key in settings))
    differing = [key for key in keys if len({settings.get(key, "not set") for settings in known}) > 1]
    rows = [
        Row(cells=[name(key), *(text(numbers.cut(settings.get(key, "not set"), 80)) for settings in known)])
        for key in differing
        if key not in ("name", "storage")
    ]
    if not rows:
        return Part(title="Settings", lines=["All runs have the same settings, but for their names and storage."])
    head = [Cell(text="setting"), *(Cell(text=run.row.name) for run in runs)]
    return Part(title="Settings that differ", table=Table(head=head, rows=rows))


def _change(before: int | None, after: int | None) -> str:
    return numbers.NONE if not before or after is None else numbers.change(1 - after / before)


def _figure(row: SweepRow, score: float | None) -> str:
    return numbers.NONE if score is None else row.measure.figure(score)


def _difference(row: SweepRow) -> float | None:
    """How much the value has changed, top-1 in points; None if that is not known."""
    if row.score_before is None or row.score_after is None:
        return None
    return row.measure.value(row.score_after) - row.measure.value(row.score_before)


def _signed(row: SweepRow, difference: float, unit: str = "") -> str:
    return numbers.signed(difference, unit) if row.measure.is_top1 else numbers.signed(difference, digits=4)
