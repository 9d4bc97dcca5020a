"""The run that the trials of a sweep begin with: it makes the prunes that all of them share."""

from __future__ import annotations

from collections.abc import Sequence

from laasp_ray.config import RunConfig
from laasp_ray.records import RunState
from laasp_ray.run.events import Happening, IterationDone, Observer, RunResumed
from laasp_ray.run.forking import fork
from laasp_ray.store.storage import Storage


class Forks:
    """Makes the runs of `trials`, as an observer of the run in `source`.

    A trial's run is made in the iteration that reaches its targets, before the run goes on: the weights of that
    iteration are stored until its next epochs. If the run is cut off in between, it is made when the run is resumed.
    """

    def __init__(self, source: Storage, trials: Sequence[RunConfig]) -> None:
        self._source, self._left = source, list(trials)

    def on_event(self, event: Happening, state: RunState) -> None:
        if not isinstance(event, IterationDone | RunResumed):
            return
        for trial in [trial for trial in self._left if trial.prune.is_reached(state.reached, state.iteration)]:
            fork(self._source, trial)
            self._left.remove(trial)

    def close(self) -> None:
        """Nothing is held."""


class PruningEndedError(Exception):
    """A trajectory has made its last prune, and its final training is for trials. No error: it ends the run there."""


class StoppedError(Exception):
    """A trial is stopped early; its argument is the reason. No error."""


class EndsBeforeFinal:
    """Ends a run, as its observer, before its final training."""

    def on_event(self, event: Happening, state: RunState) -> None:
        if state.phase == "final":
            raise PruningEndedError

    def close(self) -> None:
        """Nothing is held."""


class Observers:
    """Several observers as one, called in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def on_event(self, event: Happening, state: RunState) -> None:
        for observer in self._observers:
            observer.on_event(event, state)

    def close(self) -> None:
        for observer in self._observers:
            observer.close()
