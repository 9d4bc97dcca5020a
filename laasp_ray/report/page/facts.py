"""What a run's events come to, for the tables and pictures of its page. No effects, no formatting."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from laasp_ray.cost.latency import Latency
from laasp_ray.cost.macs import Macs
from laasp_ray.pruning.plan import Plan, pruned_macs
from laasp_ray.report.page.reading import RunRecord
from laasp_ray.report.sweep import latency_in
from laasp_ray.run.events import (
    BaselineMeasured,
    EpochDone,
    FaultSurvived,
    IterationDone,
    RunEvent,
    TrainingPhaseDone,
    last_of,
)


@dataclass(frozen=True)
class Point:
    """The loss and the primary metric after so many seconds of work. Top-1 is a share. A metric of the user's own is
    not measured in training (None).
    """

    seconds: float
    loss: float
    metric: float | None


@dataclass(frozen=True, kw_only=True)
class Curves:
    """A run over its seconds of work: time in which no driver ran does not count. `prunes` and `faults` are moments,
    `spans` the (phase, begin, end) of what was done, in order. `metric` is the primary metric's name; it is `loss` if
    there is none.
    """

    metric: str

    train: Sequence[Point]
    test: Sequence[Point]
    prunes: Sequence[float]
    faults: Sequence[float]
    spans: Sequence[tuple[str, float, float]]
    seconds: float


def curves_of(record: RunRecord) -> Curves:
    train, test, prunes, faults = [], [], [], []
    spans: list[tuple[str, float, float]] = []
    now, metric = 0.0, "top1"
    for event, begin, now in worked(record.events):
        match event:
            case EpochDone():
                train.append(Point(begin + event.seconds, event.loss, event.top1))
                _extend(spans, event.phase, begin, now)
            case IterationDone():
                prunes.append(now)
                _extend(spans, "prune", begin, now)
            case FaultSurvived():
                faults.append(now)
        if isinstance(event, EpochDone | TrainingPhaseDone | BaselineMeasured) and event.metrics is not None:
            metric, value = event.metrics.primary
            test.append(Point(now, event.metrics.loss, value))
    return Curves(metric=metric, train=train, test=test, prunes=prunes, faults=faults, spans=spans, seconds=now)


def worked(events: Sequence[RunEvent]) -> Iterator[tuple[RunEvent, float, float]]:
    """Each event with the seconds of work before and after it, as `run.totals.seconds_spent` counts them."""
    now = 0.0
    for event in events:
        begin = now
        now += sum(seconds for _, seconds in parts_of(event))
        yield event, begin, now


def parts_of(event: RunEvent) -> list[tuple[str, float]]:
    """What an event's seconds were spent on."""
    match event:
        case EpochDone():
            return [(f"training: {event.phase}", event.seconds), ("evaluation", event.test_seconds)]
        case TrainingPhaseDone():
            return [("evaluation", event.evaluation_seconds)]
        case BaselineMeasured():
            return [("evaluation", event.seconds)]
        case IterationDone():
            parts = [(f"iterations: {part}", spent) for part, spent in event.seconds.items() if part != "total"]
            total = event.seconds.get("total", sum(spent for _, spent in parts))
            return [*parts, ("iterations: other", total - sum(spent for _, spent in parts))]
    return []


def seconds_by_part(record: RunRecord) -> dict[str, float]:
    """The seconds of each kind of work, most first. Parts below a thousandth of all are left out."""
    sums: Counter[str] = Counter()
    for event in record.events:
        for part, seconds in parts_of(event):
            sums[part] += seconds  # type: ignore[assignment]
    least = sum(sums.values()) / 1000
    return {part: seconds for part, seconds in sums.most_common() if seconds > least}


def _extend(spans: list[tuple[str, float, float]], phase: str, begin: float, end: float) -> None:
    if spans and spans[-1][0] == phase:
        spans[-1] = (phase, spans[-1][1], end)
    else:
        spans.append((phase, begin, end))


@dataclass(frozen=True, kw_only=True)
class IterationRow:
    """An iteration. `flops_before` and `flops_reduction` are the shares that are gone before and after it. `layers` has
    (layer, criterion, number of filters) of each prune; it is empty if no filters were removed, and `text` says then
    what was done.
    """

    number: int
    layers: Sequence[tuple[str, str, int]]
    loss_before: float | None
    loss: float | None
    flops_before: float
    flops_reduction: float
    candidates: int
    seconds: float
    written: float
    text: str = ""
    compensated: bool | None = None


def iterations_of(record: RunRecord) -> list[IterationRow]:
    rows: list[IterationRow] = []
    gone = 0.0
    for event, written in zip(record.events, record.times, strict=True):
        if not isinstance(event, IterationDone):
            continue
        chosen = event.decision
        after = gone if chosen is None else chosen.flops_reduction
        rows.append(
            IterationRow(
                number=event.iteration,
                layers=[(one.layer, one.criterion, len(one.filters)) for one in chosen.prunes] if chosen else [],
                loss_before=chosen.loss_before if chosen else None,
                loss=chosen.loss if chosen else None,
                flops_before=gone,
                flops_reduction=after,
                candidates=event.candidates,
                seconds=event.seconds.get("total", 0.0),
                written=written,
                text=event.text,
                compensated=event.details.get("compensated"),
            )
        )
        gone = after
    return rows


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A layer before and now. Shapes and multiply-accumulates are None where the journal does not have them. `won` says
    how often each criterion chose its filters.
    """

    name: str
    filters: int
    kept: int
    shape: tuple[int, ...] | None = None
    shape_now: tuple[int, ...] | None = None
    macs: int | None = None
    macs_now: int | None = None
    won: Mapping[str, int] = field(default_factory=dict)


def layers_of(record: RunRecord) -> list[LayerRow]:
    """Every layer of which filters can be pruned and, where shapes are known, every other convolution and linear layer,
    in network order."""
    start = record.start
    last = last_of(record.events, IterationDone)
    kept = {**start.filters, **(dict(last.kept_filters) if last is not None else _layers_of_plan(start.plan))}
    won = wins_of(record)
    before = after = None
    if start.weight_shapes and set(start.weight_shapes) == set(start.macs_by_layer):
        shapes = {name: tuple(shape) for name, shape in start.weight_shapes.items()}
        before = Macs(start.macs, start.macs_by_layer, shapes, ())
        after = pruned_macs(before, _sizes(record))
    names = list(start.filters) if before is None else list(before.per_layer)
    names += [name for name in start.filters if name not in set(names)]
    rows = []
    for name in names:
        known = before is not None and name in before.per_layer
        shape = before.weight_shapes[name] if known and before else None
        filters = start.filters.get(name, shape[0] if shape else 0)
        rows.append(
            LayerRow(
                name=name,
                filters=filters,
                kept=kept.get(name, filters),
                shape=shape,
                shape_now=after.weight_shapes[name] if known and after else None,
                macs=before.per_layer[name] if known and before else None,
                macs_now=after.per_layer[name] if known and after else None,
                won=won.get(name, {}),
            )
        )
    return rows


def _layers_of_plan(plan: Mapping[str, Any] | None) -> dict[str, int]:
    return {} if plan is None else {layer: len(kept) for layer, kept in plan["layers"].items()}


def _sizes(record: RunRecord) -> Plan:
    """A plan that leaves as much of every axis as the run has left so far. Which indices stay does not matter here, and
    composing the plans of hundreds of iterations would take long.
    """
    sizes: dict[str, dict[int, int]] = {}
    steps = [event.step for event in record.events if isinstance(event, IterationDone)]
    for step in (record.start.plan, *steps):
        for name, axes in (step or {}).get("tensors", {}).items():
            sizes.setdefault(name, {}).update({int(axis): len(kept[0]) for axis, kept in axes.items()})
    return Plan(
        tensors={name: {axis: (tuple(range(size)),) for axis, size in axes.items()} for name, axes in sizes.items()}
    )


def wins_of(record: RunRecord) -> dict[str, Counter[str]]:
    """Layer -> criterion -> how many of the run's prunes it chose there; the layer with the most first."""
    won: dict[str, Counter[str]] = {}
    for row in iterations_of(record):
        for layer, criterion, _ in row.layers:
            won.setdefault(layer, Counter())[criterion] += 1
    return dict(sorted(won.items(), key=lambda entry: -entry[1].total()))


@dataclass(frozen=True, kw_only=True)
class LossMap:
    """The least loss of each layer's candidates in each iteration, above the least of all in that iteration: `rises`
    has a row for each of `layers`, with NaN where there was no candidate. `chosen` are (row, column) of the prunes.
    """

    layers: Sequence[str]
    iterations: Sequence[int]
    rises: Sequence[Sequence[float]]
    chosen: Sequence[tuple[int, int]]


def loss_map(record: RunRecord) -> LossMap | None:
    """None if no candidates' losses are there."""
    made = [row for row in iterations_of(record) if _finite(record, row)]
    if not made:
        return None
    order = {layer: number for number, layer in enumerate(record.start.filters)}
    seen = {layer for row in made for layer, _, _ in record.candidates[row.number]}
    layers = sorted(seen, key=lambda layer: (order.get(layer, len(order)), layer))
    place = {layer: number for number, layer in enumerate(layers)}
    rises = [[math.nan] * len(made) for _ in layers]
    for column, row in enumerate(made):
        least = min(_finite(record, row))
        for layer, _, found in record.candidates[row.number]:
            if math.isfinite(found) and not rises[place[layer]][column] <= found - least:  # NaN compares as False
                rises[place[layer]][column] = found - least
    chosen = [(place[layer], column) for column, row in enumerate(made) for layer, _, _ in row.layers if layer in place]
    return LossMap(layers=layers, iterations=[row.number for row in made], rises=rises, chosen=chosen)


def _finite(record: RunRecord, row: IterationRow) -> list[float]:
    return [found for _, _, found in record.candidates.get(row.number, ()) if math.isfinite(found)]


def latency_of(record: RunRecord) -> tuple[Latency, Latency] | None:
    """The latencies of the unpruned and the pruned network that were measured last, in the first engine and batch."""
    return latency_in(record.events)
