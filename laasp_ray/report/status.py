"""What a run is doing, from its folder alone: the journal, and the heartbeat of the driver that owns it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from laasp_ray.config import TARGET_ROUNDING, TARGETS
from laasp_ray.records import Metrics, to_json
from laasp_ray.report.durations import format_duration
from laasp_ray.report.tables import table_lines
from laasp_ray.run.events import (
    BaselineMeasured,
    EpochDone,
    Exhausted,
    FaultSurvived,
    Happening,
    ImageExcluded,
    IterationDone,
    RunFinished,
    RunStarted,
    TrainingPhaseDone,
)
from laasp_ray.run.metrics import primary_text
from laasp_ray.store.ownership import OwnerSeen

Driver = Literal["finished", "works", "silent", "stopped", "none"]
DRIVERS: Mapping[Driver, str] = {
    "finished": "the run is finished",
    "works": "a driver works",
    "silent": "the driver gave no sign of life while this looked: it is dead, stopped or cut off",
    "stopped": "no driver works: the last one ended; the same command resumes the run",
    "none": "no driver has begun",
}


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run as its folder tells it. Times are in seconds; what is not known yet is None or empty.

    `phase` is that of the work under way. `reached` and `targets` are shares of the unpruned network's value. `epoch`
    of `epochs` counts in the training phase. `attempts` counts the drivers so far: all but one were interrupted.
    `faults` are the losses of workers that the run survived. `eta_s` is the work that is left at the pace so far.
    """

    name: str
    uri: str
    driver: Driver
    phase: str
    iteration: int = 0
    reached: Mapping[str, float] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)
    epoch: int | None = None
    epochs: int | None = None
    loss: float | None = None
    top1: float | None = None
    test: Metrics | None = None
    last_decision: str = ""
    epoch_s: float | None = None
    iteration_s: float | None = None
    eta_s: float | None = None
    attempts: int = 0
    owner: str = ""
    heartbeat: str = ""
    excluded_images: int = 0
    faults: tuple[str, ...] = ()
    events: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**to_json(self), "driver_text": DRIVERS[self.driver]}


def status_of(
    name: str, uri: str, events: Sequence[Happening], attempts: int, before: OwnerSeen | None, now: OwnerSeen | None
) -> RunStatus:
    """The status after `events`. `before` and `now` are two looks at the owner, as long apart as its heartbeats."""
    driver = _driver(events, before, now)
    owner = "" if now is None else str(now.token)
    heartbeat = "" if now is None else now.at
    attempts = max(attempts, 0 if now is None else now.token.attempt)
    if not events or not isinstance(events[0], RunStarted):
        return RunStatus(
            name=name, uri=uri, driver=driver, phase="preparing", attempts=attempts, owner=owner, heartbeat=heartbeat
        )
    settings = _Settings.of(events[0])
    epochs = [event for event in events if isinstance(event, EpochDone)]
    iterations = [event for event in events if isinstance(event, IterationDone)]
    latest = _latest_training(events)
    epoch_s = statistics.median(e.seconds + e.test_seconds for e in epochs) if epochs else None
    iteration_s = statistics.median(i.seconds["total"] for i in iterations) if iterations else None
    reached = _reached(iterations)
    phase = _phase(events, settings, reached)
    return RunStatus(
        name=name,
        uri=uri,
        driver=driver,
        phase=phase,
        iteration=len(iterations),
        reached={of: reached.get(of, 0.0) for of in settings.targets},
        targets=settings.targets,
        epoch=None if latest is None else latest.position,
        epochs=None if latest is None else latest.epochs,
        loss=None if not epochs else epochs[-1].loss,
        top1=None if not epochs else epochs[-1].top1,
        test=_last_test(events),
        last_decision=_last_decision(iterations),
        epoch_s=epoch_s,
        iteration_s=iteration_s,
        eta_s=_eta(phase, settings, epochs, iterations, reached, epoch_s, iteration_s),
        attempts=attempts,
        owner=owner,
        heartbeat=heartbeat,
        excluded_images=sum(isinstance(event, ImageExcluded) for event in events),
        faults=tuple(event.text for event in events if isinstance(event, FaultSurvived)),
        events=len(events),
    )


@dataclass(frozen=True)
class _Settings:
    """What is read of a stored config. The whole config is not built, because that may import a method of one's own."""

    epochs: int
    prune_epoch: int
    fine_tune_epochs: int
    targets: Mapping[str, float]
    begins_pruned: bool

    @staticmethod
    def of(start: RunStarted) -> _Settings:
        train, prune = start.config.get("train", {}), start.config.get("prune", {})
        targets = {of: share for of, key in TARGETS.items() if (share := prune.get(key))}
        prune_epoch = int(train.get("prune_epoch", 0))
        return _Settings(
            epochs=int(train.get("epochs", 0)),
            prune_epoch=prune_epoch,
            fine_tune_epochs=int(prune.get("fine_tune_epochs", 0)),
            targets=targets,
            begins_pruned=prune_epoch == 0 or train.get("pretrained") is not None,
        )


def _driver(events: Sequence[Happening], before: OwnerSeen | None, now: OwnerSeen | None) -> Driver:
    if any(isinstance(event, RunFinished) for event in events):
        return "finished"
    if now is None:
        return "stopped" if events else "none"
    if now.left:
        return "stopped"
    return "works" if before is None or before != now else "silent"


def _phase(events: Sequence[Happening], settings: _Settings, reached: Mapping[str, float]) -> str:
    done = all(reached.get(of, 0.0) >= share - TARGET_ROUNDING for of, share in settings.targets.items())
    for event in reversed(events):
        match event:
            case RunFinished():
                return "done"
            case EpochDone() if event.position < event.epochs:
                return event.phase
            case EpochDone():
                return f"{event.phase}, evaluation"
            case TrainingPhaseDone() if event.phase == "final":
                return "finishing"
            case TrainingPhaseDone() | IterationDone():
                return "final" if settings.targets and done else "prune"
            case Exhausted():
                return "final"
            case RunStarted() | BaselineMeasured():
                return "prune" if settings.begins_pruned and settings.targets else "train"
    return "preparing"


def _latest_training(events: Sequence[Happening]) -> EpochDone | None:
    """The last epoch, if its training phase is still under way."""
    for event in reversed(events):
        if isinstance(event, EpochDone):
            return event
        if isinstance(event, (TrainingPhaseDone, IterationDone)):
            return None
    return None


def _last_test(events: Sequence[Happening]) -> Metrics | None:
    for event in reversed(events):
        if isinstance(event, (EpochDone, TrainingPhaseDone, BaselineMeasured, RunFinished)) and event.metrics:
            return event.metrics
    return None


def _last_decision(iterations: Sequence[IterationDone]) -> str:
    if not iterations:
        return ""
    last = iterations[-1]
    if last.decision is None:
        return last.text
    made = last.decision
    return f"{made.layer} by {made.criterion}, loss {made.loss:.4f}"


def _reached(iterations: Sequence[IterationDone]) -> dict[str, float]:
    if not iterations:
        return {}
    last = iterations[-1]
    flops = {} if last.decision is None else {"FLOPs": last.decision.flops_reduction}
    return flops | dict(last.reached)


def _eta(
    phase: str,
    settings: _Settings,
    epochs: Sequence[EpochDone],
    iterations: Sequence[IterationDone],
    reached: Mapping[str, float],
    epoch_s: float | None,
    iteration_s: float | None,
) -> float | None:
    """The seconds of the work that is left, or None as long as a pace that it needs is not known."""
    if phase == "done":
        return 0.0
    left_iterations = _iterations_left(settings, len(iterations), reached)
    if left_iterations is None:
        return None
    final_done = sum(epoch.phase == "final" for epoch in epochs)
    train_done = sum(epoch.phase == "train" for epoch in epochs)
    trained = settings.begins_pruned or phase not in ("train", "train, evaluation", "preparing")
    left_epochs = float(settings.epochs - settings.prune_epoch - final_done)
    left_epochs += 0 if trained else settings.prune_epoch - train_done
    if left_iterations:
        fine_tuned = sum(epoch.phase == "fine-tune" for epoch in epochs)
        left_epochs += left_iterations * fine_tuned / len(iterations)
    if (left_epochs and epoch_s is None) or (left_iterations and iteration_s is None):
        return None
    return left_epochs * (epoch_s or 0.0) + left_iterations * (iteration_s or 0.0)


def _iterations_left(settings: _Settings, done: int, reached: Mapping[str, float]) -> int | None:
    """None as long as no pace is known."""
    left = 0
    for of, share in settings.targets.items():
        gone = reached.get(of, 0.0)
        if gone >= share - TARGET_ROUNDING:
            continue
        if not done or gone <= 0:
            return None
        left = max(left, math.ceil((share - gone) / (gone / done) - 1e-9))
    return left


def status_text(status: RunStatus) -> str:
    """Some lines for people."""
    rows = [("run", f"{status.name} in {status.uri}"), ("driver", DRIVERS[status.driver])]
    if status.owner and status.driver != "finished":
        rows.append(("", f"attempt {status.attempts}: {status.owner}"))
        rows += [("", f"last heartbeat {status.heartbeat} by its clock")] if status.heartbeat else []
    elif status.attempts > 1:
        rows.append(("", f"{status.attempts} drivers, one after the other"))
    where = f", epoch {status.epoch} of {status.epochs}" if status.epoch is not None else ""
    rows.append(("phase", f"{status.phase}{where}"))
    for of, target in status.targets.items():
        rows.append((f"{of} reduction", f"{status.reached[of]:.2%} of {target:.2%}, {status.iteration} iterations"))
    if status.last_decision:
        rows.append(("last prune", status.last_decision))
    if status.loss is not None:
        rows.append(("training", _with_loss(status.loss, "" if status.top1 is None else f"top-1 {status.top1:.2%}")))
    if status.test is not None:
        rows.append(("test", _with_loss(status.test.loss, primary_text(status.test))))
    pace = [f"{format_duration(seconds)} an {what}" for what, seconds in _paces(status) if seconds is not None]
    rows.append(("pace", ", ".join(pace) or "not known yet"))
    if status.driver != "finished":
        rows.append(
            ("time left", "not known yet" if status.eta_s is None else f"about {format_duration(status.eta_s)}")
        )
    if status.faults:
        rows.append(("faults survived", f"{len(status.faults)}, the last: {status.faults[-1]}"))
    if status.excluded_images:
        rows.append(("images left out", str(status.excluded_images)))
    width = max(len(head) for head, _ in rows)
    return "\n".join(f"{head:<{width}}  {text}".rstrip() for head, text in rows)


def _paces(status: RunStatus) -> list[tuple[str, float | None]]:
    return [("epoch", status.epoch_s), ("iteration", status.iteration_s)]


def statuses_table(statuses: Sequence[RunStatus]) -> str:
    """One line a run."""
    classify = all(one.test is None or one.test.top1 is not None for one in statuses)
    head = "test top-1" if classify else "test"
    rows = [["run", "driver", "phase", "iterations", "reduction", head, "time left"]]
    for one in statuses:
        reduction = ", ".join(f"{one.reached[of]:.1%} of {share:.1%} {of}" for of, share in one.targets.items())
        left = "" if one.driver == "finished" else "?" if one.eta_s is None else format_duration(one.eta_s)
        rows.append([one.name, one.driver, one.phase, str(one.iteration), reduction, _test_of(one), left])
    return "\n".join(table_lines(rows, left=(0, 1, 2, 4)))


def _test_of(one: RunStatus) -> str:
    if one.test is None:
        return ""
    if one.test.top1 is not None:
        return f"{one.test.top1:.2%}"
    return primary_text(one.test) or f"loss {one.test.loss:.4f}"


def _with_loss(loss: float, metric: str) -> str:
    return f"loss {loss:.4f}" + (f", {metric}" if metric else "")
