"""What a run's events come to: its metrics before pruning, its best epoch, its exports and the seconds of its work."""

from __future__ import annotations

from collections.abc import Iterable

from laasp_ray.export.network import Export
from laasp_ray.records import Metrics
from laasp_ray.run.events import (
    BaselineMeasured,
    BestEpoch,
    EpochDone,
    Happening,
    IterationDone,
    NetworkExported,
    TrainingPhaseDone,
)


def metrics_before(events: Iterable[Happening]) -> Metrics | None:
    """The test metrics after the first training, or of the given weights if there was no such training."""
    before: Metrics | None = None
    for event in events:
        if isinstance(event, BaselineMeasured) or (isinstance(event, TrainingPhaseDone) and event.phase == "train"):
            before = event.metrics
    return before


def exports_of(events: Iterable[Happening]) -> tuple[Export, ...]:
    """The last export of each format, in the order of their first."""
    found = {event.export.format: event.export for event in events if isinstance(event, NetworkExported)}
    return tuple(found.values())


def best_epoch(events: Iterable[Happening]) -> BestEpoch | None:
    """The epoch of the final training with the best primary test metric (top-1 in classification); the first of equals.
    None if there were no epochs.

    Only epochs with an evaluation count. The last epoch has one, at the end of its training phase.
    """
    tested: list[BestEpoch] = []
    epoch: int | None = None
    for event in events:
        if isinstance(event, (EpochDone, TrainingPhaseDone)) and event.phase == "final":
            epoch = event.epoch if isinstance(event, EpochDone) else epoch
            if epoch is not None and event.metrics is not None:
                tested.append(BestEpoch(epoch=epoch, metrics=event.metrics))
    return max(tested, key=lambda found: found.metrics.score, default=None)


def seconds_spent(events: Iterable[Happening]) -> float:
    """The seconds of the run's epochs, iterations and evaluations, over all attempts."""
    total = 0.0
    for event in events:
        match event:
            case EpochDone():
                total += event.seconds + event.test_seconds
            case IterationDone():
                total += event.seconds["total"]
            case TrainingPhaseDone():
                total += event.evaluation_seconds
            case BaselineMeasured():
                total += event.seconds
    return total
