"""A sweep in this process: one trial after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from laasp_ray.errors import SearchError
from laasp_ray.records import RunState
from laasp_ray.report.progress import make_progress
from laasp_ray.run.events import Happening, Observer
from laasp_ray.sweep.directors import Director
from laasp_ray.sweep.trajectory import StoppedError
from laasp_ray.sweep.trials import Outcome, Reports, Trial, run_trial


def run_here(
    director: Director, say: Callable[[str], None], observe: Callable[[Trial], Observer] | None = None
) -> None:
    """Runs the director's trials to the end. `observe` makes the observer of a trial, by default its progress."""
    while (trial := director.next()) is not None:
        say(f"{trial.name} begins")
        director.ended(trial.name, _run(director, trial, observe or _progress))
    if not director.is_done:
        raise SearchError("the sweep has trials left that cannot begin: start the same command again")


def _run(director: Director, trial: Trial, observe: Callable[[Trial], Observer]) -> Outcome:
    seen: list[float] = []

    def report(curve: Sequence[float], line: str) -> None:
        seen[:] = curve

    stops = _Stops(lambda: director.stop_reason(trial.name, seen))
    try:
        return run_trial(trial, [Reports(trial.config, report), observe(trial), stops], distributed=False)
    except StoppedError as stopped:
        return Outcome(stopped=str(stopped), curve=tuple(seen))


class _Stops:
    """Ends a run, as its last observer, as soon as there is a reason."""

    def __init__(self, reason: Callable[[], str]) -> None:
        self._reason = reason

    def on_event(self, event: Happening, state: RunState) -> None:
        if reason := self._reason():
            raise StoppedError(reason)

    def close(self) -> None:
        """Nothing is held."""


def _progress(trial: Trial) -> Observer:
    return make_progress(trial.config.prune.targets, sys.stderr)
