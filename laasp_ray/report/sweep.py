"""A sweep's results: a row a trial, as a table, as JSON and as a plot of accuracy against cost."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from laasp_ray.cost.latency import Latency
from laasp_ray.report.durations import format_duration
from laasp_ray.report.summary import Summary, summarise
from laasp_ray.report.tables import table_lines
from laasp_ray.run.events import Happening, IterationDone, LatencyMeasured, RunFinished, RunStarted, last_of
from laasp_ray.run.metrics import TOP1, Measure
from laasp_ray.run.totals import seconds_spent

SCHEMA_VERSION = 1
FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One trial. Top-1 is in %, on the test images: just before the first prune, and of the finished network. A task of
    the user's own is compared by its `metric` (or its loss) instead, whose values are `value_before` and `value_after`;
    `better` says which values of it are.

    `macs` are for one input. `latency_ms` is the median of the unpruned and of this network, measured by turns. Of the
    `seconds` of a run of its own, `shared_seconds` were the other run's that it began with. A value that is not known
    is None. `status` is 'finished', or why there is no result. `settings` are those that a search chose for it.
    """

    name: str
    target: str
    folder: str
    status: str
    flops_reduction: float | None = None
    macs: int | None = None
    macs_unpruned: int | None = None
    parameters: int | None = None
    parameters_unpruned: int | None = None
    latency_ms: tuple[float, float] | None = None
    top1_before: float | None = None
    top1_after: float | None = None
    metric: str = "top1"
    better: Literal["higher", "lower"] = "higher"
    value_before: float | None = None
    value_after: float | None = None
    seconds: float = 0.0
    shared_seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return self.status == FINISHED

    @property
    def measure(self) -> Measure:
        return Measure(self.metric, self.better)

    @property
    def score_before(self) -> float | None:
        """By `measure`: higher is better."""
        return self.top1_before if self.measure.is_top1 else _score(self.measure, self.value_before)

    @property
    def score_after(self) -> float | None:
        return self.top1_after if self.measure.is_top1 else _score(self.measure, self.value_after)

    def figure(self, score: float | None) -> str:
        """A score of this row as text."""
        return "-" if score is None else self.measure.figure(score)


def row_from(
    name: str,
    events: Sequence[Happening],
    *,
    target: str,
    folder: str,
    why: str = "not finished",
    latency_ms: tuple[float, float] | None = None,
) -> SweepRow:
    """The row of a run, from its journal. `why` is the status of one that has not finished. Without a `latency_ms` it
    is the one that the run measured at its end, if it did.
    """
    if not events:
        return SweepRow(name=name, target=target, folder=folder, status=why)
    summary, start = summarise(events), events[0]
    finish = last_of(events, RunFinished)
    pair = latency_in(events)
    if latency_ms is None and finish is not None and pair is not None:
        latency_ms = pair[0].median_ms, pair[1].median_ms
    shared = dict(start.forked or {}) if isinstance(start, RunStarted) else {}
    return SweepRow(
        name=name,
        target=target,
        folder=folder,
        status=FINISHED if finish is not None else why,
        flops_reduction=summary.reached["FLOPs"],
        macs=summary.macs_after,
        macs_unpruned=summary.macs,
        parameters=summary.parameters_after,
        parameters_unpruned=summary.parameters,
        latency_ms=latency_ms,
        **_compared(summary),
        seconds=seconds_spent(events),
        shared_seconds=float(shared.get("seconds", 0.0)),
    )


def _compared(summary: Summary) -> dict[str, Any]:
    """The fields of a row that networks are compared by."""
    before, after = summary.before, summary.after
    known = after or before
    if known is None or known.top1 is not None:
        percents = [None if one is None or one.top1 is None else 100 * one.top1 for one in (before, after)]
        return {"top1_before": percents[0], "top1_after": percents[1]}
    values = [None if one is None else one.primary[1] for one in (before, after)]
    name = known.primary[0]
    return {"metric": name, "better": known.better, "value_before": values[0], "value_after": values[1]}


def _score(measure: Measure, value: float | None) -> float | None:
    if value is None:
        return None
    return -math.inf if math.isnan(value) else measure.value(value)


def latency_in(events: Sequence[Happening]) -> tuple[Latency, Latency] | None:
    """The latencies of the unpruned and the pruned network that were measured last, in the first engine and batch."""
    for event in reversed(events):
        if isinstance(event, LatencyMeasured):
            for row in event.rows:
                if row.unpruned is not None and row.pruned is not None:
                    return row.unpruned, row.pruned
        if isinstance(event, IterationDone) and event.latency is not None:
            return event.latency
    return None


def row_of_json(data: Mapping[str, Any]) -> SweepRow:
    """The inverse of a trial's form in `sweep.json`. A key that this version does not know is passed over."""
    known = {key: value for key, value in data.items() if key in SweepRow.__dataclass_fields__}
    if known.get("latency_ms") is not None:
        known["latency_ms"] = tuple(known["latency_ms"])
    return SweepRow(**known)


def comparable(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """The finished rows that are measured as the first of them: one metric, in which they can be compared."""
    finished = [row for row in rows if row.is_finished and row.score_after is not None]
    return [row for row in finished if row.measure == finished[0].measure]


def measure_of(rows: Sequence[SweepRow]) -> Measure:
    """What the comparable rows are compared by; top-1 if there are none, and nothing says otherwise."""
    known = comparable(rows) or [row for row in rows if row.score_before is not None]
    return known[0].measure if known else TOP1


def pareto_front(rows: Sequence[SweepRow], cost: Callable[[SweepRow], float] | None = None) -> list[SweepRow]:
    """The comparable rows that no other one beats: no worse in their metric and of at most its `cost`, and one of them
    better. The cost is by default that of multiply-accumulates.
    """
    of = _macs if cost is None else cost

    def beats(other: SweepRow, row: SweepRow) -> bool:
        a, b = (score_of(other), -of(other)), (score_of(row), -of(row))
        return a[0] >= b[0] and a[1] >= b[1] and a != b

    compared = comparable(rows)
    return [row for row in compared if not any(beats(other, row) for other in compared)]


def sweep_table(rows: Sequence[SweepRow], best: str | None = None) -> str:
    """The rows as text; the best one is marked."""
    label = measure_of(rows).label
    head = ("", "target", "FLOPs", "MACs", "parameters", "ms", f"{label} before", "after", "seconds", "shared", "")
    lines = [head, *(_cells(row, row.name == best) for row in rows)]
    return "\n".join(table_lines(lines, left=(0, 1, 10)))


def _cells(row: SweepRow, is_best: bool) -> tuple[str, ...]:
    reduction = "-" if row.flops_reduction is None else f"{-row.flops_reduction:+.2%}"
    ms = "-" if row.latency_ms is None else f"{row.latency_ms[1]:.2f} of {row.latency_ms[0]:.2f}"
    note = "best" if is_best else "" if row.is_finished else row.status
    if row.settings:
        chosen = ", ".join(f"{key}={value}" for key, value in row.settings.items())
        note = f"{note}; {chosen}" if note else chosen
    return (
        row.name,
        row.target,
        reduction,
        _count(row.macs),
        _count(row.parameters),
        ms,
        row.figure(row.score_before),
        row.figure(row.score_after),
        format_duration(row.seconds - row.shared_seconds),
        format_duration(row.shared_seconds) if row.shared_seconds else "-",
        note,
    )


def sweep_json(
    rows: Sequence[SweepRow], *, goal: Mapping[str, Any], rule: str, best: str | None, said: str, machine: str
) -> dict[str, Any]:
    """What `sweep.json` holds. `said` is the result in a sentence; `machine` is what latencies were measured on."""
    return {
        "schema_version": SCHEMA_VERSION,
        "goal": dict(goal),
        "rule": rule,
        "best": best,
        "said": said,
        "latency_measured_on": machine,
        "pareto_front": [row.name for row in pareto_front(rows)],
        "trials": [asdict(row) for row in rows],
    }


def pareto_png(rows: Sequence[SweepRow], best: str | None, title: str) -> bytes:
    """A plot of the metric against the share of FLOPs that is left, and beside it against the measured latency."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    compared, measure = comparable(rows), measure_of(rows)
    front = {row.name for row in pareto_front(compared)}
    timed = [row for row in compared if row.latency_ms is not None]
    figure = Figure(figsize=(10 if timed else 5.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [("FLOPs, % of the unpruned network's", compared, _flops_left)]
    if timed:
        panels.append(("median latency, ms", timed, _milliseconds))
    for number, (label, shown, place) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        ordered = sorted((row for row in shown if row.name in front), key=place)
        chosen = [row for row in shown if row.name == best]
        axes.plot([place(row) for row in ordered], list(map(value_of, ordered)), color="0.7", zorder=1)
        axes.scatter([place(row) for row in shown], list(map(value_of, shown)), s=30, zorder=2, label="pruned")
        axes.scatter(
            [place(row) for row in chosen], list(map(value_of, chosen)), s=90, marker="*", zorder=3, label="best"
        )
        before = [row.measure.value(row.score_before) for row in shown if row.score_before is not None]
        if before:
            axes.axhline(before[0], color="0.6", linestyle=":", label="before the first prune")
        for row in shown:
            axes.annotate(row.name, (place(row), value_of(row)), xytext=(4, 5), textcoords="offset points", size=7)
        axes.set(xlabel=label, ylabel=measure.axis)
        if measure.better == "lower":
            axes.invert_yaxis()  # up is better
        axes.legend(fontsize=7, loc="lower right")
    figure.suptitle(title, size=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def counted(number: int, what: str) -> str:
    """`number` of `what`, a noun that takes an s."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def _flops_left(row: SweepRow) -> float:
    return 100 * (1 - (row.flops_reduction or 0.0))


def _macs(row: SweepRow) -> float:
    return row.macs or 0


def score_of(row: SweepRow) -> float:
    """The score of a finished row."""
    assert row.score_after is not None, f"{row.name} has no {row.measure.label} and cannot be compared by it"
    return row.score_after


def value_of(row: SweepRow) -> float:
    """The value that is drawn of a finished row: top-1 in percent."""
    return row.measure.value(score_of(row))


def _milliseconds(row: SweepRow) -> float:
    return row.latency_ms[1] if row.latency_ms else 0.0


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
