"""The events of a run: frozen dataclasses for the journal's events, and events that only observers get.

The journal (store/journal.py) stores names and JSON, and this module defines their meaning. Code that reads a journal
gets these types. Code that shows or copies a run's progress is an `Observer`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from pydantic import TypeAdapter, ValidationError

from laasp_ray.cost.latency import Latency
from laasp_ray.errors import StoreError
from laasp_ray.export.latency import EngineLatency
from laasp_ray.export.network import Export
from laasp_ray.records import CandidateLoss, Decision, Metrics, Phase, RunState, to_json
from laasp_ray.store.journal import REMEDY, Event, Journal


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """The first event. `config` is the whole config's plain form, `checkpoint` the initial weights' name, `plan` that
    of the pruned network the run goes on with (None: the unpruned one). `images` identify both splits. `task`
    identifies the user's own data, loss and metrics (None: classification of images). `batch_parts` is the number of
    parts of a global batch, one for each worker at the start (None: an older run). `forked` is there if the run begins
    with what another one did: that one's folder (`from`), its `iteration`, and how many of the `events` and `seconds`
    are its own. `macs_by_layer` and `weight_shapes` are of the unpruned convolutions and linear layers. `machine` says
    what the run began on: `driver`, `workers` and `software`, as texts. Here as in other events, `digests` are of the
    files that were stored for the event: name in the run's folder -> sha256."""

    NAME: ClassVar = "start"
    config: Mapping[str, Any]
    checkpoint: str
    macs: int
    macs_convention: str
    parameters: int
    filters: Mapping[str, int]
    step_sizes: Mapping[str, int]
    layers: int
    skipped_layers: Mapping[str, str]
    train_images: int
    test_images: int
    images: Mapping[Literal["train", "test"], Mapping[str, Any]] = field(default_factory=dict)
    task: Mapping[str, Any] | None = None
    method: str | None = None
    plan: Mapping[str, Any] | None = None
    batch_parts: int | None = None
    forked: Mapping[str, Any] | None = None
    macs_by_layer: Mapping[str, int] = field(default_factory=dict)
    weight_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CalibrationDrawn:
    """The calibration images were drawn, without those in `excluded`. `digest` is over their bytes."""

    NAME: ClassVar = "calibration"
    images: int
    digest: str
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BaselineMeasured:
    """The weights that the run was given were evaluated. `loader` is the loader that decoded the images."""

    NAME: ClassVar = "baseline"
    metrics: Metrics
    loader: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """`epoch` (from 0) of the schedule is done: number `position` (from 1) of the `epochs` of its training phase.

    `loss` and `top1` are of training; `top1` is None for a loss of the user's own. `metrics` are of the test images, if
    they were evaluated. `checkpoint` names the stored weights.
    """

    NAME: ClassVar = "epoch"
    phase: Phase
    training_phase: int
    epoch: int
    position: int
    epochs: int
    epochs_trained: int
    learning_rate: float
    loss: float
    top1: float | None = None
    images: int
    seconds: float
    test_seconds: float
    checkpoint: str
    metrics: Metrics | None = None
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainingPhaseDone:
    """Training phase number `training_phase` (from 0) is done. `metrics` are of the test images."""

    NAME: ClassVar = "training_phase"
    phase: Phase
    training_phase: int
    metrics: Metrics
    loader: str
    seconds: float
    evaluation_seconds: float


@dataclass(frozen=True, kw_only=True)
class IterationDone:
    """An iteration of the method is done.

    `step` is the plan of the prune; None if no filters were removed. `kept_filters` are left in the layers pruned so
    far. `candidates` is the number compared. `reached` and `latency` (unpruned, pruned) are for targets other than
    FLOPs. `ends_pruning` says whether this was the last iteration; with None the targets decide. `details` are the
    method's. `text` is the method's progress line if there is no `decision`.
    """

    NAME: ClassVar = "iteration"
    iteration: int
    seconds: Mapping[str, float]
    decision: Decision | None = None
    step: Mapping[str, Any] | None = None
    kept_filters: Mapping[str, int] = field(default_factory=dict)
    candidates: int = 0
    reached: Mapping[str, float] = field(default_factory=dict)
    latency: tuple[Latency, Latency] | None = None
    ends_pruning: bool | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Exhausted:
    """Pruning ends before its target, because no layer has a filter left to prune."""

    NAME: ClassVar = "exhausted"
    reason: str


@dataclass(frozen=True, kw_only=True)
class ImageExcluded:
    """An image cannot be read and is left out from now on. `split`, `index` and `label` are its place, if known."""

    NAME: ClassVar = "excluded"
    image: str
    reason: str
    split: Literal["train", "test"] | None = None
    index: int | None = None
    label: int | None = None


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """The epoch (from 0) of the final training with the best primary metric on the test images (top-1 in
    classification); the first of equals.
    """

    epoch: int
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class FaultSurvived:
    """A part of the run was lost and replaced: `text` says which one, where and why. It changes nothing else."""

    NAME: ClassVar = "fault"
    text: str


@dataclass(frozen=True, kw_only=True)
class NetworkExported:
    """The finished network was exported, or `export` says why it was not. After the run's end another export may come
    (jobs/export.py): the last one of a format counts."""

    NAME: ClassVar = "export"
    export: Export


@dataclass(frozen=True, kw_only=True)
class LatencyMeasured:
    """The unpruned and the finished network were timed by turns: a row for each engine and batch."""

    NAME: ClassVar = "latency"
    rows: tuple[EngineLatency, ...]


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    """The pruned network is in the store.

    `metrics` are the last ones on the test images. `seconds` is the time of epochs, iterations and evaluations.
    `details` are the method's, and `text` is its result in one line.
    """

    NAME: ClassVar = "finish"
    macs: int
    macs_unpruned: int
    macs_convention: str
    flops_reduction: float
    parameters: int
    parameters_unpruned: int
    metrics: Metrics
    seconds: float
    parameters_reduction: float | None = None
    latency_reduction: float | None = None
    best: BestEpoch | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


RunEvent = (
    RunStarted
    | CalibrationDrawn
    | BaselineMeasured
    | EpochDone
    | TrainingPhaseDone
    | IterationDone
    | Exhausted
    | ImageExcluded
    | FaultSurvived
    | NetworkExported
    | LatencyMeasured
    | RunFinished
)
"""The types of the journal's events."""

EVENTS: Mapping[str, Any] = {event.NAME: event for event in RunEvent.__args__}  # type: ignore[attr-defined]
"""Event name -> its type."""


@dataclass(frozen=True, kw_only=True)
class RunResumed:
    """An interrupted run resumes from its state. Not in the journal."""


@dataclass(frozen=True, kw_only=True)
class PhaseStarted:
    """A training phase, an iteration or an evaluation begins; `detail` describes it. Not in the journal."""

    phase: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class CandidatesMeasured:
    """`done` of an iteration's `total` candidates have their loss. `latest` is one of the new ones. Not in the
    journal.
    """

    iteration: int
    done: int
    total: int
    latest: CandidateLoss | None = None


Happening = RunEvent | RunResumed | PhaseStarted | CandidatesMeasured


class Observer(Protocol):
    """Receives every event with the state after it. An observer must not change the state."""

    def on_event(self, event: Happening, state: RunState) -> None: ...

    def close(self) -> None:
        """Releases resources. It may be called twice."""


def data_of(event: RunEvent) -> dict[str, Any]:
    """The JSON form of an event, without its name."""
    return dict(to_json(event))


def event_from(name: str, data: Mapping[str, Any], place: str = "an event") -> RunEvent:
    """The event of this name and JSON form. Raises StoreError, naming the place, if the data do not fit."""
    try:
        event: RunEvent = _adapter(name).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        fault = f"it lacks {where!r}" if first["type"] == "missing" else f"{where} is {first['input']!r:.80}"
        raise StoreError(f"{place} is damaged: {fault}; {REMEDY}") from error
    return event


def read_event(event: Event, uri: str = "the journal") -> RunEvent:
    """Converts a journal's event to its type. Raises StoreError, naming the file, if it is damaged or has an unknown
    name.
    """
    place = f"journal/{event.sequence:06d}-{event.name}.json in {uri}"
    if event.name not in EVENTS:
        raise StoreError(f"{place} is no event that this version knows; use the version that wrote the run")
    return event_from(event.name, event.data, place)


def read_events(journal: Journal) -> list[RunEvent]:
    """All events of a journal, in order. Raises StoreError for one that is damaged."""
    return [read_event(event, journal.uri) for event in journal.events()]


def started(journal: Journal) -> RunStarted | None:
    """The first event of a run, or None if there is none yet. Raises StoreError if it is damaged."""
    event = journal.last(RunStarted.NAME)
    found = None if event is None else read_event(event, journal.uri)
    return found if isinstance(found, RunStarted) else None


def last_of(events: Iterable[Happening], kind: type) -> Any:
    """The last event of this type, or None."""
    found = None
    for event in events:
        found = event if isinstance(event, kind) else found
    return found


@functools.cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(EVENTS[name])
