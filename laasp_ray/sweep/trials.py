"""A trial of a sweep: an ordinary run, in a folder of its own, and what came of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from laasp_ray.api import prune
from laasp_ray.config import RunConfig
from laasp_ray.errors import describe_error
from laasp_ray.records import Metrics, RunState
from laasp_ray.report.progress import decision_line, epoch_line, resumed_line
from laasp_ray.run.events import (
    EpochDone,
    Happening,
    IterationDone,
    Observer,
    RunFinished,
    RunResumed,
    RunStarted,
    TrainingPhaseDone,
    read_events,
)
from laasp_ray.run.metrics import Measure
from laasp_ray.run.preflight import folded
from laasp_ray.store.journal import Journal, event_file
from laasp_ray.store.storage import Storage
from laasp_ray.sweep.trajectory import EndsBeforeFinal, Forks, Observers, PruningEndedError, StoppedError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`forks` are runs that begin with what this one does. `only_prunes` ends it before its final training."""

    config: RunConfig
    forks: tuple[RunConfig, ...] = ()
    only_prunes: bool = False

    @property
    def name(self) -> str:
        return self.config.name

    def to_json(self) -> dict[str, Any]:
        forks = [fork.to_dict() for fork in self.forks]
        return {"config": self.config.to_dict(), "forks": forks, "only_prunes": self.only_prunes}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Trial:
        forks = tuple(RunConfig.from_dict(fork) for fork in data["forks"])
        return Trial(config=RunConfig.from_dict(data["config"]), forks=forks, only_prunes=data["only_prunes"])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended: with the score of its finished network (run.metrics.Measure; None for one that only prunes),
    stopped early for the reason in `stopped`, or with an `error`. `curve` has the scores of its final training so far,
    epoch by epoch.
    """

    score: float | None = None
    stopped: str = ""
    error: str = ""
    curve: tuple[float, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {"top1": self.score, "stopped": self.stopped, "error": self.error, "curve": list(self.curve)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Outcome:
        return Outcome(score=data["top1"], stopped=data["stopped"], error=data["error"], curve=tuple(data["curve"]))


def folder_of(config: RunConfig) -> Storage:
    return Storage.open(config.storage).child(config.name)


def has_begun(config: RunConfig) -> bool:
    """Whether the run's first event is there. Of a fork that was cut off later ones may be there without it."""
    return folder_of(config).exists(event_file(1, RunStarted.NAME))


def is_finished(config: RunConfig) -> bool:
    return has_begun(config) and Journal(folder_of(config)).last(RunFinished.NAME) is not None


def has_pruned(config: RunConfig) -> bool:
    """Whether the run has made its last prune."""
    return has_begun(config) and folded(Journal(folder_of(config)), config).phase in ("final", "done")


def outcome_of(config: RunConfig) -> Outcome:
    """What the run's journal says of it so far."""
    curve = Curve()
    events = read_events(Journal(folder_of(config)))
    for event in events:
        curve.add(event)
    finish = next((event for event in events if isinstance(event, RunFinished)), None)
    return Outcome(score=None if finish is None else score_of(finish.metrics), curve=tuple(curve.scores))


class Curve:
    """The scores of a run's final training: one an epoch with an evaluation."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def add(self, event: Happening) -> bool:
        """Whether the event adds a value."""
        is_final = isinstance(event, EpochDone | TrainingPhaseDone) and event.phase == "final"
        if not is_final or event.metrics is None:  # type: ignore[union-attr]
            return False
        self.scores.append(score_of(event.metrics))  # type: ignore[union-attr, arg-type]
        return True


class Reports:
    """Reports a run, as its observer: the curve so far, and a line on what happened. A resumed run's curve begins with
    its journal's.
    """

    def __init__(self, config: RunConfig, report: Callable[[Sequence[float], str], None]) -> None:
        self._curve, self._report, self._targets = Curve(), report, config.prune.targets
        for event in read_events(Journal(folder_of(config))):
            self._curve.add(event)

    def on_event(self, event: Happening, state: RunState) -> None:
        self._curve.add(event)
        match event:
            case IterationDone() if event.decision is not None:
                self._report(self._curve.scores, decision_line(event, state.reached, self._targets))
            case EpochDone():
                self._report(self._curve.scores, epoch_line(event))
            case RunResumed():
                self._report(self._curve.scores, resumed_line(state, self._targets))
            case RunFinished():
                self._report(self._curve.scores, event.text)

    def close(self) -> None:
        """Nothing is held."""


def run_trial(trial: Trial, observers: Sequence[Observer], **how: Any) -> Outcome:
    """Carries out a trial, or goes on with it. `how` are arguments of `prune`.

    An error is the outcome's `error`: the sweep goes on with its other trials.
    """
    watching = list(observers)
    if trial.forks:
        watching.append(Forks(folder_of(trial.config), trial.forks))
    if trial.only_prunes:
        watching.append(EndsBeforeFinal())
    try:
        prune(trial.config, progress=Observers(watching), **how)
    except PruningEndedError:
        return Outcome()
    except StoppedError:
        raise
    except Exception as error:
        logger.debug("the trial %s ended", trial.name, exc_info=True)
        return Outcome(error=describe_error(error))
    return outcome_of(trial.config)


def score_of(metrics: Metrics) -> float:
    """The score by the primary metric, or by the loss without one."""
    return Measure.of(metrics).score(metrics)
