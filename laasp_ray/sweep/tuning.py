"""A sweep under Ray Tune: a trial of Tune calls `prune` for one of the sweep's runs, which joins the same cluster.

What is known of a trial is in its run's folder, not in Tune's: a sweep that was cut off begins another Tune session,
which hands out what is left. Trials hold no devices themselves, since their trainers and search workers do; how many
run at a time is bounded by what fits (sweep/shares.py).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from laasp_ray.errors import SearchError
from laasp_ray.sweep.directors import Director
from laasp_ray.sweep.trials import Outcome, Reports, Trial, is_finished, outcome_of, run_trial

TRIAL_CPUS = 0.01
"""What a trial's driver holds. It waits, mostly."""
FAILURES = 5
"""How often a trial is begun again after its driver was lost, with its node, say."""
_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep as it ends a run
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_on_tune(director: Director, slots: int, say: Callable[[str], None]) -> None:
    """Runs the director's trials on the connected cluster, at most `slots` at a time. Raises the director's error, or
    a SearchError if Tune ended before the director was done.
    """
    before = {key: os.environ.get(key) for key in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    suggestions = _Suggestions(director, say)
    log = logging.getLogger("ray.tune")
    level = log.level
    log.setLevel(logging.ERROR)  # of its own result files, which are not kept
    try:
        with tempfile.TemporaryDirectory(prefix="laasp_ray-tune-") as scratch:
            tuner = tune.Tuner(
                tune.with_resources(_trial, {"CPU": TRIAL_CPUS}),
                tune_config=tune.TuneConfig(
                    search_alg=suggestions,
                    scheduler=_Stopping(suggestions),
                    num_samples=-1,
                    max_concurrent_trials=slots,
                    metric="top1",
                    mode="max",
                    reuse_actors=False,
                ),
                run_config=tune.RunConfig(
                    name="sweep",
                    storage_path=scratch,
                    verbose=0,
                    stop=_StopsAll(suggestions),
                    failure_config=tune.FailureConfig(max_failures=FAILURES),
                ),
            )
            tuner.fit()
    finally:
        log.setLevel(level)
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)
    if suggestions.failure is not None:
        raise suggestions.failure
    if not director.is_done or director.running:
        raise SearchError("Ray Tune ended before the sweep did: start the same command again, it goes on")


def _trial(settings: Mapping[str, Any]) -> None:
    """The function that Tune calls for a trial, in a process of its own."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # Ray hides all GPUs; a run's driver measures latencies on one
        del os.environ["CUDA_VISIBLE_DEVICES"]
    torch.set_num_threads(settings["threads"])  # Ray gives a small share of a CPU one, and sums depend on it
    trial = Trial.from_json(settings["trial"])

    def report(curve: Any, line: str) -> None:
        tune.report({"top1": curve[-1] if curve else 0.0, "curve": list(curve), "line": line})

    outcome = run_trial(trial, [Reports(trial.config, report)])
    tune.report({"top1": outcome.top1 or 0.0, "curve": list(outcome.curve), "line": "", "error": outcome.error})


class _Suggestions(Searcher):
    """Tune's view of a director. `failure` is an error of the director, which ends the sweep."""

    def __init__(self, director: Director, say: Callable[[str], None]) -> None:
        super().__init__(metric="top1", mode="max")
        self.director, self.say = director, say
        self.failure: Exception | None = None
        self.stopped: dict[str, str] = {}
        self._names: dict[str, Trial] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune stores its searcher, for a session that this sweep never goes back to."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        if self.failure is not None:
            return Searcher.FINISHED
        try:
            trial = self.director.next()
        except Exception as error:  # Tune would go on without it, and wait for ever
            self.failure = error
            return Searcher.FINISHED
        if trial is None:
            return Searcher.FINISHED if self.director.is_done else None
        self._names[trial_id] = trial
        self.say(f"{trial.name} begins")
        return {"name": trial.name, "trial": trial.to_json(), "threads": torch.get_num_threads()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._names.pop(trial_id, None)
        if trial is None:
            return
        try:
            outcome = self._outcome(trial, result or {}, error)
            self.director.ended(trial.name, outcome)
            self.say(f"{trial.name} ends: {_said(outcome)}")
        except Exception as failure:
            self.failure = failure

    def _outcome(self, trial: Trial, result: Mapping[str, Any], failed: bool) -> Outcome:
        reason = self.stopped.pop(trial.name, "")
        if reason and not is_finished(trial.config):
            return Outcome(stopped=reason, curve=tuple(result.get("curve", ())))
        if failed:
            return Outcome(error=f"its process was lost {FAILURES + 1} times, or ended by an error that Ray has logged")
        if result.get("error"):
            return Outcome(error=result["error"], curve=tuple(result.get("curve", ())))
        return Outcome() if trial.only_prunes else outcome_of(trial.config)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's folder has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's folder has it all."""


class _Stopping(FIFOScheduler):
    """Stops trials for the director's reasons. The time is epochs of final training, not iterations of Tune."""

    def __init__(self, suggestions: _Suggestions) -> None:
        super().__init__()
        self._suggestions = suggestions

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name, suggestions = trial.config["name"], self._suggestions
        if result.get("line"):
            suggestions.say(f"{name}: {result['line']}")
        reason = suggestions.director.stop_reason(name, result.get("curve", ()))
        if reason and "error" not in result:
            suggestions.stopped[name] = reason
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE


class _StopsAll(Stopper):
    """Ends the session once the director has failed."""

    def __init__(self, suggestions: _Suggestions) -> None:
        self._suggestions = suggestions

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._suggestions.failure is not None


def _said(outcome: Outcome) -> str:
    if outcome.error:
        return outcome.error
    if outcome.stopped:
        return f"stopped, {outcome.stopped}"
    return "pruned" if outcome.top1 is None else f"top-1 {outcome.top1:.2f}%"
