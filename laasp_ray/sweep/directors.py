"""What a sweep runs next. A director hands out trials and takes their outcomes; it knows nothing of Ray.

Its state follows from the runs' folders and from the outcomes in the sweep's journal, so that a sweep that was cut off
goes on where it was.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from laasp_ray.config import ClusterConfig, RunConfig
from laasp_ray.errors import SearchError
from laasp_ray.records import Metrics
from laasp_ray.report.summary import summarise
from laasp_ray.run.events import IterationDone, RunStarted, read_events
from laasp_ray.run.forking import decides_by_target, fork
from laasp_ray.run.metrics import TOP1, Measure
from laasp_ray.store.journal import Journal, event_file
from laasp_ray.store.storage import Storage
from laasp_ray.sweep import bracket, latency
from laasp_ray.sweep.goals import MaxDrop, WithinLatency, filter_prune, inside
from laasp_ray.sweep.targets import TargetRuns
from laasp_ray.sweep.trials import Outcome, Trial, folder_of, has_begun, has_pruned, is_finished, outcome_of

logger = logging.getLogger(__name__)

TRAJECTORY = "trajectory"
SLACK, SLACK_SHARE = 0.5, 0.5
"""What a running trial may still gain beyond what any finished one did: points of top-1; of another metric a share of
the drop that is allowed.
"""
Record = Callable[[str, Outcome], None]


class Director(ABC):
    """`record` gets every outcome first. `trials` are the runs that have a place in the table, in its order."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self.running: dict[str, Trial] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.trials: list[RunConfig] = []

    def next(self) -> Trial | None:
        """The next trial, which counts as running from now on; None if there is none, or none yet."""
        trial = self._next()
        if trial is not None:
            self.running[trial.name] = trial
        return trial

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether no trial will come any more, whatever the running ones give."""

    def ended(self, name: str, outcome: Outcome) -> None:
        self._record(name, outcome)
        self.running.pop(name, None)
        self.outcomes[name] = outcome
        self._ended(name, outcome)

    def stop_reason(self, name: str, curve: Sequence[float]) -> str:
        """Why a running trial with these scores so far had better stop; empty if it goes on."""
        return ""

    @abstractmethod
    def _next(self) -> Trial | None: ...

    @abstractmethod
    def _ended(self, name: str, outcome: Outcome) -> None: ...


class TargetsDirector(Director):
    """The deepest target's run, then each other target's as soon as the deepest has come past it."""

    def __init__(self, runs: TargetRuns, record: Record) -> None:
        super().__init__(record)
        self.trials = [*runs.others, runs.deepest]
        self._deepest = runs.deepest
        self._deepest_ended = is_finished(runs.deepest)
        self._handed = self._deepest_ended and all(has_begun(run) for run in runs.others)
        self._left = [run for run in runs.others if not is_finished(run)]

    def _next(self) -> Trial | None:
        if not self._handed:
            self._handed, self._deepest_ended = True, False
            return Trial(config=self._deepest, forks=tuple(self._left))
        # A run that makes decisions of its own needs the search, which the deepest one has until then.
        ready = None
        for run in self._left:
            if has_begun(run) and (self._deepest_ended or not decides_by_target(run.prune)):
                ready = run
                break
        if ready is None:
            return None
        self._left.remove(ready)
        return Trial(config=ready)

    def _ended(self, name: str, outcome: Outcome) -> None:
        if name != self._deepest.name:
            return
        self._deepest_ended = True
        for run in [run for run in self._left if not has_begun(run)]:
            self._left.remove(run)
            why = outcome.error or "pruning ended before it"
            lost = Outcome(error=f"the target was not reached by {self._deepest.name}: {why}")
            self._record(run.name, lost)
            self.outcomes[run.name] = lost

    @property
    def is_done(self) -> bool:
        return self._handed and not self._left


class BracketDirector(Director):
    """A trajectory of prunes, then trials of its iterations that close in on the deepest one that meets the bar."""

    def __init__(
        self,
        config: RunConfig,
        goal: MaxDrop,
        slots: int,
        alone: ClusterConfig,
        record: Record,
        earlier: Mapping[str, Outcome],
    ) -> None:
        """`config` is the sweep's. `slots` trials run at a time; the trajectory before them has the section `alone`.
        `earlier` are the outcomes of the sweep so far.
        """
        super().__init__(record)
        self.trajectory = replace(trajectory_of(config), cluster=alone)
        self._goal, self._slots, self._sweep = goal, slots, config
        self._handed = has_pruned(self.trajectory)
        self._iterations: list[float] = []
        self.measure, self.base = TOP1, 0.0
        self.results: dict[int, bool] = {}
        self._earlier = dict(earlier)
        self._unfinished: list[int] = []
        self._queue: list[int] = []
        if self._handed:
            self._begin()

    @property
    def _slack(self) -> float:
        return SLACK if self.measure.is_top1 else SLACK_SHARE * self._goal.points

    @property
    def bar(self) -> float:
        """The least score that is within the drop."""
        return self.base - self._goal.points

    @property
    def iterations(self) -> int:
        return len(self._iterations)

    def config_of(self, iteration: int) -> RunConfig:
        """The run that ends pruning with this iteration of the trajectory: its target is what that one reached."""
        name, share = f"iteration-{iteration:03d}", self._iterations[iteration - 1]
        return inside(self._sweep, name, flops_reduction=share)

    def _begin(self) -> None:
        """Reads the trajectory, and which of its iterations have been tried."""
        self._iterations = reductions_of(self.trajectory)
        before = base_metrics(self.trajectory)
        self.measure = Measure.of(before)
        self.base = self._goal.base_top1 or self.measure.score(before)
        for number in range(1, self.iterations + 1):
            run = self.config_of(number)
            outcome = outcome_of(run) if has_begun(run) else None
            if outcome is None or outcome.score is None:
                outcome = self._earlier.get(run.name)
            if outcome is not None and not outcome.error:  # what failed is tried again
                self._note(run.name, outcome)
            if has_begun(run) and (outcome is None or (outcome.score is None and not outcome.stopped)):
                self._unfinished.append(number)

    def _next(self) -> Trial | None:
        if not self._handed:
            self._handed = True
            return Trial(config=self.trajectory, only_prunes=True)
        if not self._iterations:
            return None
        running = [number_of(name) for name in self.running]
        free = self._slots - len(running)
        while self._unfinished and free > 0:  # trials that ran when the sweep was cut off
            number = self._unfinished.pop(0)
            if not bracket.is_needless(number, self.results, self.iterations):
                return Trial(config=self.config_of(number))
        if free > 0 and not self._queue:
            self._queue = bracket.next_iterations(self.results, running, self.iterations, free)
        if free <= 0 or not self._queue:
            return None
        run = self.config_of(self._queue.pop(0))
        fork(folder_of(self.trajectory), run)
        return Trial(config=run)

    def _ended(self, name: str, outcome: Outcome) -> None:
        if name != TRAJECTORY:
            self._note(name, outcome)
        elif outcome.error:
            raise SearchError(f"the trajectory of the sweep ended: {outcome.error}")
        else:
            self._begin()

    def _note(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        self._queue.clear()  # what is tried next depends on what is known
        number = number_of(name)
        if outcome.error:
            raise SearchError(f"the trial {name} ended: {outcome.error}")
        if outcome.score is not None:
            self.results[number] = outcome.score >= self.bar
        elif outcome.stopped == BELOW:
            self.results[number] = False
        if self.config_of(number) not in self.trials:
            self.trials = sorted([*self.trials, self.config_of(number)], key=lambda run: run.name)

    def stop_reason(self, name: str, curve: Sequence[float]) -> str:
        if name == TRAJECTORY:
            return ""
        if bracket.is_needless(number_of(name), self.results, self.iterations):
            return NEEDLESS
        finished = [outcome.curve for outcome in self.outcomes.values() if outcome.score is not None]
        return BELOW if bracket.cannot_meet(curve, self.bar, finished, self._slack) else ""

    @property
    def is_done(self) -> bool:
        if not self._handed or TRAJECTORY in self.running:
            return False
        return self.bounds.is_exact and not self.running  # one that runs may open the bounds again

    @property
    def bounds(self) -> bracket.Bounds:
        return bracket.bounds(self.results, self.iterations)


NEEDLESS = "another trial has shown that it cannot be the answer"
BELOW = "predicted to miss the bar: what finished trials gained after this epoch does not bring it there"


class LatencyDirector(Director):
    """A trajectory of prunes to a latency, then the final training of its first network that is within it."""

    def __init__(self, config: RunConfig, goal: WithinLatency, share: float, record: Record) -> None:
        """`config` is the sweep's. `share` is how much of the unpruned network's latency has to go."""
        super().__init__(record)
        self.trajectory = trajectory_of(inside_latency(config, share))
        self._goal = goal
        self._handed = has_pruned(self.trajectory)
        self._trial: RunConfig | None = None
        if self._handed:
            self._choose()

    def _choose(self) -> None:
        iteration = self._begun() or self._first_within()
        prune = replace(filter_prune(self.trajectory), iterations=iteration)
        self._trial = replace(
            self.trajectory,
            name=f"iteration-{iteration:03d}",
            prune=prune,
            train=replace(self.trajectory.train, keep_checkpoints=False),
        )
        self.trials = [self._trial]
        if is_finished(self._trial):
            self.outcomes[self._trial.name] = outcome_of(self._trial)

    def _first_within(self) -> int:
        iteration, took = latency.first_within(self.trajectory, self._goal.ms)
        if took > self._goal.ms:
            logger.warning(
                "the trajectory's last network takes %.2f ms when it is measured again, not %g: it is trained, and not "
                "named as within; ask for less under another --name to have it pruned on",
                took,
                self._goal.ms,
            )
        return iteration

    def _begun(self) -> int | None:
        """The iteration whose trial has begun, before the sweep was cut off: what is measured varies."""
        names = Storage.open(self.trajectory.storage).list("iteration-")
        begun = [name.partition("/")[0] for name in names if name.endswith(event_file(1, RunStarted.NAME))]
        return number_of(begun[0]) if begun else None

    def _next(self) -> Trial | None:
        if not self._handed:
            self._handed = True
            return Trial(config=self.trajectory, only_prunes=True)
        if self._trial is None or self._trial.name in self.outcomes or self._trial.name in self.running:
            return None
        fork(folder_of(self.trajectory), self._trial)
        return Trial(config=self._trial)

    def _ended(self, name: str, outcome: Outcome) -> None:
        if name == TRAJECTORY:
            if outcome.error:
                raise SearchError(f"the trajectory of the sweep ended: {outcome.error}")
            self._choose()

    @property
    def is_done(self) -> bool:
        return self._trial is not None and (self._trial.name in self.outcomes or self._trial.name in self.running)


def trajectory_of(config: RunConfig) -> RunConfig:
    """The run that prunes to the deepest reduction that a search may give, and keeps the weights of each iteration."""
    run = inside(config, TRAJECTORY)
    return replace(run, train=replace(run.train, keep_checkpoints=True))


def inside_latency(config: RunConfig, share: float) -> RunConfig:
    """The run of a sweep that prunes until `share` of the latency is gone."""
    prune = replace(filter_prune(config), flops_reduction=0.0, parameters_reduction=0.0, latency_reduction=share)
    return replace(config, prune=prune)


def reductions_of(run: RunConfig) -> list[float]:
    """The share of FLOPs that is gone after each iteration of a run."""
    events = read_events(Journal(folder_of(run)))
    decisions = [event.decision for event in events if isinstance(event, IterationDone)]
    return [decision.flops_reduction for decision in decisions if decision is not None]


def number_of(name: str) -> int:
    """The iteration that a trial of a trajectory ends with."""
    return int(name.rpartition("-")[2])


def base_metrics(run: RunConfig) -> Metrics:
    """The test metrics just before the first prune of a run."""
    before = summarise(read_events(Journal(folder_of(run)))).before
    if before is None:
        raise SearchError(f"{folder_of(run).uri} has no test metrics from before its first prune")
    return before
