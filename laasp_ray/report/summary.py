"""What came of a run, from its journal alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from laasp_ray.config import TARGETS
from laasp_ray.errors import StoreError
from laasp_ray.records import Decision, Metrics, decision_from_json
from laasp_ray.report.eta import format_duration
from laasp_ray.report.tables import table_lines
from laasp_ray.store.journal import Event


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """`epoch`, from 0, of the `epochs` of the whole schedule, and the test metrics after it."""

    epoch: int
    epochs: int
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run so far. What has not happened yet is None or empty. `targets` and `reached` go by what a target may be of
    (config.TARGETS); `reached` has FLOPs and what else is a target.

    `macs` are of one input, `macs_after` and `parameters_after` of the finished network. `before` and `after` are the
    test metrics before the first prune and at the end, `best` is the epoch of the final training with the highest
    top-1 on the test images. `iteration_seconds` has the mean seconds of an iteration by where they went,
    `phase_seconds` the seconds of training by phase, `kept_filters` the filters left in each pruned layer, `filters`
    those that every prunable layer began with.
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
    finished: bool = False
    exhausted: bool = False


def summarise(events: Sequence[Event]) -> Summary:
    """Raises StoreError if the journal does not begin with a `start` event, or an event lacks what it should hold."""
    if not events or events[0].name != "start":
        raise StoreError("the journal has no start event: is this the folder of a run?")
    by_name: dict[str, list[Event]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(event)
    try:
        return _summary(events[0].data, by_name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"the journal of this run lacks something ({error!r}); was it written by another version of laasp_ray?"
        ) from error


def format_summary(summary: Summary) -> str:
    """Text tables: the network before and after, the iterations and their seconds, the layers."""
    state = "finished" if summary.finished else "not finished"
    if summary.exhausted:
        state += " (pruning ended short of its target, with no filter left to give)"
    lines = [f"Run {summary.name}: {state}, {_reductions(summary)}", ""]
    lines += table_lines(_network_rows(summary))
    lines += ["", *_iteration_lines(summary)] if summary.targets else [""]
    if summary.phase_seconds:
        spent = ", ".join(f"{phase} {format_duration(seconds)}" for phase, seconds in summary.phase_seconds.items())
        lines += [f"Training: {summary.epochs} epochs; {spent}"]
    if summary.best is not None:
        lines += [_best_line(summary.best)]
    if summary.excluded_images:
        lines += [f"Images left out: {', '.join(summary.excluded_images)}"]
    if summary.kept_filters:
        layers = [(name, str(kept), _count(summary.filters.get(name))) for name, kept in summary.kept_filters.items()]
        lines += ["", *table_lines([("layer", "filters kept", "of"), *layers])]
    return "\n".join(lines)


def _summary(start: Mapping[str, Any], by_name: Mapping[str, Sequence[Event]]) -> Summary:
    iterations = [event.data for event in by_name.get("iteration", ())]
    decisions = tuple(decision_from_json(iteration["decision"]) for iteration in iterations)
    finish = by_name["finish"][-1].data if "finish" in by_name else None
    prune = start["config"]["prune"]
    targets = {of: prune[key] for of, key in TARGETS.items() if prune.get(key)}
    reached = dict.fromkeys({"FLOPs": 0.0} | targets, 0.0)
    if iterations:
        reached |= {"FLOPs": decisions[-1].flops_reduction, **iterations[-1].get("reached", {})}
    if finish:
        reached["FLOPs"] = finish["flops_reduction"]
    training_phases = [event.data for event in by_name.get("training_phase", ())]
    phases: dict[str, float] = {}
    for training_phase in training_phases:
        phases[training_phase["phase"]] = phases.get(training_phase["phase"], 0.0) + float(training_phase["seconds"])
    return Summary(
        name=start["config"]["name"],
        targets=targets,
        macs=start["macs"],
        parameters=start["parameters"],
        macs_after=finish["macs"] if finish else None,
        parameters_after=finish["parameters"] if finish else None,
        reached=reached,
        before=_metrics_before(training_phases, by_name),
        after=_metrics(finish["metrics"]) if finish else None,
        best=_best(finish["best"], start["config"]) if finish and finish["best"] else None,
        decisions=decisions,
        candidates=sum(iteration["candidates"] for iteration in iterations),
        exhausted="exhausted" in by_name,
        iteration_seconds=_mean_seconds(iterations),
        phase_seconds=phases,
        epochs=len(by_name.get("epoch", ())),
        filters=start["filters"],
        kept_filters=iterations[-1]["kept_filters"] if iterations else {},
        excluded_images=tuple(event.data["image"] for event in by_name.get("excluded", ())),
        finished=finish is not None,
    )


def _metrics_before(
    training_phases: Sequence[Mapping[str, Any]], by_name: Mapping[str, Sequence[Event]]
) -> Metrics | None:
    """Those after the first training, or of the weights that the run was given in its place."""
    trained = [training_phase for training_phase in training_phases if training_phase["phase"] == "train"]
    if trained:
        return _metrics(trained[-1]["metrics"])
    return _metrics(by_name["baseline"][-1].data["metrics"]) if "baseline" in by_name else None


def _best(data: Mapping[str, Any], config: Mapping[str, Any]) -> BestEpoch:
    return BestEpoch(epoch=data["epoch"], epochs=config["train"]["epochs"], metrics=_metrics(data["metrics"]))


def _metrics(data: Mapping[str, Any]) -> Metrics:
    return Metrics(loss=float(data["loss"]), top1=float(data["top1"]), top5=float(data["top5"]), images=data["images"])


def _mean_seconds(iterations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for iteration in iterations:
        for part, seconds in iteration["seconds"].items():
            sums[part] = sums.get(part, 0.0) + float(seconds)
    return {part: seconds / len(iterations) for part, seconds in sums.items()}


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
    for label, name in (("top-1", "top1"), ("top-5", "top5")):
        rows.append((label, *(f"{getattr(m, name):.2%}" if m else "-" for m in (summary.before, summary.after))))
    rows.append(("loss", *(f"{m.loss:.4f}" if m else "-" for m in (summary.before, summary.after))))
    rows.append(("test images", *(f"{m.images:,}" if m else "-" for m in (summary.before, summary.after))))
    return rows


def _best_line(best: BestEpoch) -> str:
    metrics = best.metrics
    return (
        f"Best tested epoch of the final training: {best.epoch + 1} of {best.epochs}, top-1 {metrics.top1:.2%}, "
        f"top-5 {metrics.top5:.2%}, loss {metrics.loss:.4f} (the table has the last)"
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
