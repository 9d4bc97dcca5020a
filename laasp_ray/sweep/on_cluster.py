"""A sweep on a cluster: its trials are those of Ray Tune (distributed/tuning.py), and each is a run that joins the same
cluster. What is known of a trial is in its run's folder, not in Tune's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from laasp_ray.sweep.directors import Director
from laasp_ray.sweep.trials import Outcome, Reports, Trial, is_finished, outcome_of, run_trial


class DirectedTrials:
    """A director's trials as Tune's plan. `say` gets a line for whatever happens in one."""

    def __init__(self, director: Director, say: Callable[[str], None]) -> None:
        self._director, self._say = director, say
        self._stopped: dict[str, str] = {}

    @property
    def is_done(self) -> bool:
        return self._director.is_done

    def next(self) -> Mapping[str, Any] | None:
        trial = self._director.next()
        if trial is None:
            return None
        self._say(f"{trial.name} begins")
        return {"name": trial.name, "trial": trial.to_json(), "threads": torch.get_num_threads()}

    def reported(self, name: str, report: Mapping[str, Any]) -> bool:
        if report.get("line"):
            self._say(f"{name}: {report['line']}")
        reason = "" if "error" in report else self._director.stop_reason(name, report.get("curve", ()))
        if reason:
            self._stopped[name] = reason
        return bool(reason)

    def ended(self, name: str, last: Mapping[str, Any], *, lost: bool) -> None:
        outcome = self._outcome(self._director.running[name], last, lost)
        self._director.ended(name, outcome)
        self._say(f"{name} ends: {_said(outcome)}")

    def _outcome(self, trial: Trial, last: Mapping[str, Any], lost: bool) -> Outcome:
        reason = self._stopped.pop(trial.name, "")
        if reason and not is_finished(trial.config):
            return Outcome(stopped=reason, curve=tuple(last.get("curve", ())))
        if lost:
            return Outcome(error="its process was lost again and again; Ray's logs say more")
        if last.get("error"):
            return Outcome(error=last["error"], curve=tuple(last.get("curve", ())))
        return Outcome() if trial.only_prunes else outcome_of(trial.config)


def carry_out(settings: Mapping[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Carries out a trial, in a process of its own."""
    torch.set_num_threads(settings["threads"])  # Ray gives a small share of a CPU one, and sums depend on it
    trial = Trial.from_json(settings["trial"])

    def on_event(curve: Sequence[float], line: str) -> None:
        report({"score": curve[-1] if curve else 0.0, "curve": list(curve), "line": line})

    outcome = run_trial(trial, [Reports(trial.config, on_event)])
    report({"score": outcome.score or 0.0, "curve": list(outcome.curve), "line": "", "error": outcome.error})


def _said(outcome: Outcome) -> str:
    if outcome.error:
        return outcome.error
    if outcome.stopped:
        return f"stopped, {outcome.stopped}"
    return "pruned" if outcome.score is None else "finished"
