"""Trials under Ray Tune: who runs next is asked of a plan, and each trial is a function in a process of its own.

Nothing of Tune's own state is kept: the plan knows what is done. Trials hold no devices, since what they start does;
how many run at a time is the caller's to bound. They all run on the caller's node: they see the folders that the caller
sees, and what they measure is measured on one machine.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from laasp_ray.errors import SearchError

TRIAL_HOLDS = {"memory": 1}
"""What a trial's process takes of its node, of which Ray wants something: it waits, mostly. The head of a cluster may
have no CPUs.
"""
FAILURES = 5
"""How often a trial is begun again after its process was lost."""
METRIC = "score"
_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the driver as it ends a run's
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
Report = Callable[[dict[str, Any]], None]


class TrialPlan(Protocol):
    """What the trials are. `name` in a trial's settings is its name; a report has METRIC and whatever else."""

    @property
    def is_done(self) -> bool:
        """Whether no trial will come any more, whatever the running ones give."""

    def next(self) -> Mapping[str, Any] | None:
        """The settings of the next trial; None if there is none, or none yet."""

    def reported(self, name: str, report: Mapping[str, Any]) -> bool:
        """Takes a report of a running trial. Whether that one stops."""

    def ended(self, name: str, last: Mapping[str, Any], *, lost: bool) -> None:
        """Takes the end of a trial, with its last report; `lost` if its process was, too often."""


def run_trials(plan: TrialPlan, function: Callable[[Mapping[str, Any], Report], None], slots: int) -> None:
    """Calls `function(settings, report)` for each trial on this node of the connected cluster, `slots` at a time.

    `function` is one of a module's. Raises the plan's first error, or a SearchError if Tune ended before the plan was
    done.
    """
    suggestions = _Suggestions(plan)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}

    def trial(settings: Mapping[str, Any]) -> None:
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # Ray hides all GPUs; a run's driver measures latencies on one
            del os.environ["CUDA_VISIBLE_DEVICES"]
        function(settings, tune.report)

    with _tune_set_up(), tempfile.TemporaryDirectory(prefix="laasp_ray-tune-") as scratch:
        tune.Tuner(
            tune.with_resources(trial, tune.PlacementGroupFactory([TRIAL_HOLDS], bundle_label_selector=[here])),
            tune_config=tune.TuneConfig(
                search_alg=suggestions,
                scheduler=_Stopping(suggestions),
                num_samples=-1,
                max_concurrent_trials=slots,
                metric=METRIC,
                mode="max",
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                stop=_StopsAll(suggestions),
                failure_config=tune.FailureConfig(max_failures=FAILURES),
            ),
        ).fit()
    if suggestions.failure is not None:
        raise suggestions.failure
    if not plan.is_done or suggestions.names:
        raise SearchError("Ray Tune ended before all trials did: start the same command again, it goes on")


@contextmanager
def _tune_set_up() -> Iterator[None]:
    before = {key: os.environ.get(key) for key in _ENVIRONMENT}
    log = logging.getLogger("ray.tune")
    level = log.level
    os.environ.update(_ENVIRONMENT)
    log.setLevel(logging.ERROR)  # warnings are of Tune's own result files, which are not kept
    try:
        yield
    finally:
        log.setLevel(level)
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


class _Suggestions(Searcher):
    """Tune's view of a plan. `failure` is an error of the plan, which ends the session.

    Tune catches what its searcher and its scheduler raise, and goes on: the trial would run again, or be waited for
    without end.
    """

    def __init__(self, plan: TrialPlan) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.plan = plan
        self.failure: Exception | None = None
        self.names: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune stores its searcher, for a session that nobody goes back to."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        if self.failure is not None:
            return Searcher.FINISHED
        try:
            settings = self.plan.next()
            if settings is None:
                return Searcher.FINISHED if self.plan.is_done else None
        except Exception as error:
            self.failure = error
            return Searcher.FINISHED
        self.names[trial_id] = settings["name"]
        return dict(settings)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        name = self.names.pop(trial_id, None)
        if name is None:
            return
        try:
            self.plan.ended(name, result or {}, lost=error)
        except Exception as failure:
            self.failure = failure

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the plan knows what is done."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the plan knows what is done."""


class _Stopping(FIFOScheduler):
    """Stops the trials that the plan stops, by what they report."""

    def __init__(self, suggestions: _Suggestions) -> None:
        super().__init__()
        self._suggestions = suggestions

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        try:
            stops = self._suggestions.plan.reported(trial.config["name"], result)
        except Exception as failure:
            self._suggestions.failure = failure
            return TrialScheduler.STOP
        return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE


class _StopsAll(Stopper):
    """Ends the session once the plan has failed."""

    def __init__(self, suggestions: _Suggestions) -> None:
        self._suggestions = suggestions

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._suggestions.failure is not None
