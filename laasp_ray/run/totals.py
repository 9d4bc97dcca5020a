"""What a run's events come to: its best epoch and the seconds of its work."""

from __future__ import annotations

from collections.abc import Iterable

from laasp_ray.run.events import (
    BaselineMeasured,
    BestEpoch,
    EpochDone,
    Happening,
    IterationDone,
    TrainingPhaseDone,
)


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
