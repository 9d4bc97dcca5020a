"""A summary of a run, from its journal alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from laasp_ray.config import TARGETS
from laasp_ray.errors import StoreError
from laasp_ray.export.latency import EngineLatency
from laasp_ray.export.network import Export
from laasp_ray.records import Decision, Metrics
from laasp_ray.report.durations import format_duration
from laasp_ray.report.latency import latency_lines
from laasp_ray.report.tables import table_lines
from laasp_ray.run.events import (
    EpochDone,
    Exhausted,
    FaultSurvived,
    Happening,
    ImageExcluded,
    IterationDone,
    LatencyMeasured,
    RunFinished,
    RunStarted,
    TrainingPhaseDone,
    last_of,
)
from laasp_ray.run.metrics import form_of, label_of, metrics_text, noun_of
from laasp_ray.run.totals import exports_of, metrics_before


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """The best epoch of the final training: `epoch`, from 0, of the `epochs` of the whole schedule, and the test
    metrics after it.
    """

    epoch: int
    epochs: int
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run so far. A value that is not known yet is None or empty.

    `targets` and `reached` have a share for each quantity (config.TARGETS). `reached` has FLOPs and every other
    quantity with a target. `macs` are for one input; `macs_after` and `parameters_after` are of the finished network.
    `before` and `after` are the test metrics before the first prune and at the end, on `noun`. `best` is the epoch of
    the final training with the best primary metric in tests. `iteration_seconds` has the mean seconds of each part of
    an iteration, and `phase_seconds` the seconds of training by phase. `kept_filters` has the filters left in each
    pruned layer, and `filters` the initial number in every prunable layer. `compensated` says for every prune that
    could be made up for whether it was. `exports` and `latency` are of the finished network.
    """

    name: str
    targets: Mapping[str, float]
    macs: int
    parameters: int
    reached: Mapping[str, float]
    macs_after: int | None = None
    parameters_after: int | None = None
    before: Metrics | None = None
    after: Metrics | None = None
    best: BestEpoch | None = None
    decisions: tuple[Decision, ...] = ()
    candidates: int = 0
    iteration_seconds: Mapping[str, float] = field(default_factory=dict)
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    epochs: int = 0
    filters: Mapping[str, int] = field(default_factory=dict)
    kept_filters: Mapping[str, int] = field(default_factory=dict)
    excluded_images: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    compensated: tuple[bool, ...] = ()
    exports: tuple[Export, ...] = ()
    latency: tuple[EngineLatency, ...] = ()
    noun: str = "images"
    finished: bool = False
    exhausted: bool = False


def summarise(events: Sequence[Happening]) -> Summary:
    """The summary of all events so far. Raises StoreError if the first is not a RunStarted."""
    if not events or not isinstance(events[0], RunStarted):
        raise StoreError("the journal has no start event: is this the folder of a run?")
    start = events[0]
    try:
        name, epochs, prune = start.config["name"], start.config["train"]["epochs"], start.config["prune"]
        targets = {of: float(prune[key]) for of, key in TARGETS.items() if prune.get(key)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"the journal of this run lacks something ({error!r}); was it written by another version of laasp_ray?"
        ) from error
    iterations = [event for event in events if isinstance(event, IterationDone)]
    decisions = [event.decision for event in iterations if event.decision is not None]
    phases = [event for event in events if isinstance(event, TrainingPhaseDone)]
    finish = last_of(events, RunFinished)
    reached = dict.fromkeys({"FLOPs": 0.0} | targets, 0.0)
    if decisions:
        reached |= {"FLOPs": decisions[-1].flops_reduction, **iterations[-1].reached}
    if finish:
        reached["FLOPs"] = finish.flops_reduction
    return Summary(
        name=name,
        targets=targets,
        macs=start.macs,
        parameters=start.parameters,
        macs_after=finish.macs if finish else None,
        parameters_after=finish.parameters if finish else None,
        reached=reached,
        before=metrics_before(events),
        after=finish.metrics if finish else None,
        best=BestEpoch(epoch=finish.best.epoch, epochs=epochs, metrics=finish.best.metrics)
        if finish and finish.best
        else None,
        decisions=tuple(decisions),
        candidates=sum(event.candidates for event in iterations),
        exhausted=last_of(events, Exhausted) is not None,
        iteration_seconds=_mean_seconds(iterations),
        phase_seconds=_phase_seconds(phases),
        epochs=sum(isinstance(event, EpochDone) for event in events),
        filters=start.filters,
        kept_filters=iterations[-1].kept_filters if iterations else {},
        excluded_images=tuple(event.image for event in events if isinstance(event, ImageExcluded)),
        faults=tuple(event.text for event in events if isinstance(event, FaultSurvived)),
        compensated=tuple(event.details["compensated"] for event in iterations if "compensated" in event.details),
        exports=exports_of(events),
        latency=timed.rows if (timed := last_of(events, LatencyMeasured)) else (),
        noun=noun_of((start.config.get("data") or {}).get("factory")),
        finished=finish is not None,
    )


def format_summary(summary: Summary) -> str:
    """Text tables: the network before and after, the iterations and their seconds, the layers."""
    state = "finished" if summary.finished else "not finished"
    if summary.exhausted:
        state += " (pruning ended short of its target, with no filter left to give)"
    lines = [f"Run {summary.name}: {state}, {_reductions(summary)}", ""]
    lines += table_lines(_network_rows(summary))
    lines += ["", *_iteration_lines(summary)] if summary.targets else [""]
    if summary.compensated:
        made_up, prunes = sum(summary.compensated), len(summary.compensated)
        worse = "" if made_up == prunes else f"; for {prunes - made_up} the loss was lower without"
        lines += [f"Compensation: {made_up} of {prunes} prunes were made up for{worse}"]
    if summary.phase_seconds:
        spent = ", ".join(f"{phase} {format_duration(seconds)}" for phase, seconds in summary.phase_seconds.items())
        lines += [f"Training: {summary.epochs} epochs; {spent}"]
    if summary.best is not None:
        lines += [_best_line(summary.best)]
    lines += [export.text for export in summary.exports]
    if summary.latency:
        lines += ["", *latency_lines(summary.latency)]
    if summary.excluded_images:
        lines += [f"Images left out: {', '.join(summary.excluded_images)}"]
    if summary.faults:
        lines += [f"Faults survived: {len(summary.faults)}, the last: {summary.faults[-1]}"]
    if summary.kept_filters:
        layers = [(name, str(kept), _count(summary.filters.get(name))) for name, kept in summary.kept_filters.items()]
        lines += ["", *table_lines([("layer", "filters kept", "of"), *layers])]
    return "\n".join(lines)


def _mean_seconds(iterations: Sequence[IterationDone]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for event in iterations:
        for part, seconds in event.seconds.items():
            sums[part] = sums.get(part, 0.0) + seconds
    return {part: seconds / len(iterations) for part, seconds in sums.items()}


def _phase_seconds(phases: Sequence[TrainingPhaseDone]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for event in phases:
        sums[event.phase] = sums.get(event.phase, 0.0) + event.seconds
    return sums


def _reductions(summary: Summary) -> str:
    targets = summary.targets
    parts = [
        f"{of} reduction {share:.2%}" + (f" of {targets[of]:.2%}" if of in targets else "")
        for of, share in summary.reached.items()
    ]
    return ", ".join(parts)


def _network_rows(summary: Summary) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "before", "after")]
    rows.append(("MACs", f"{summary.macs:,}", _count(summary.macs_after)))
    rows.append(("parameters", f"{summary.parameters:,}", _count(summary.parameters_after)))
    metrics = summary.after or summary.before
    for name in ("top1", "top5") if metrics is None else metrics.named:
        texts = (form_of(name).format(m.named[name]) if m else "-" for m in (summary.before, summary.after))
        rows.append((label_of(name), *texts))
    rows.append(("loss", *(f"{m.loss:.4f}" if m else "-" for m in (summary.before, summary.after))))
    rows.append((f"test {summary.noun}", *(f"{m.images:,}" if m else "-" for m in (summary.before, summary.after))))
    return rows


def _best_line(best: BestEpoch) -> str:
    metrics = best.metrics
    return (
        f"Best tested epoch of the final training: {best.epoch + 1} of {best.epochs}, "
        f"{metrics_text(metrics)} (the table has the last)"
    )


def _iteration_lines(summary: Summary) -> list[str]:
    count = len(summary.decisions)
    if not count:
        return ["Iterations: none yet"]
    parts = {part: seconds for part, seconds in summary.iteration_seconds.items() if part != "total"}
    total = summary.iteration_seconds.get("total", sum(parts.values()))
    split = ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items())
    compared = f"{summary.candidates / count:.0f} candidates each, " if summary.candidates else ""
    return [f"Iterations: {count}, {compared}{total:.2f} s each ({split})"]


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
