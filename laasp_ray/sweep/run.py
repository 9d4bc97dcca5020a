"""A whole sweep: checks, the trials, and what came of them.

Its folder, the name of its config in its storage, has the runs of its trials, a journal of its own, `sweep.json`,
`pareto.png` and `report.html`. The journal's first event has the config and the goal; the others say how trials ended.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from laasp_ray import models
from laasp_ray.config import RunConfig
from laasp_ray.config.compat import differences
from laasp_ray.distributed.address import check_address
from laasp_ray.errors import ConfigError
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.report.sweep import SweepRow, counted, measure_of, pareto_png, sweep_json
from laasp_ray.run.events import RunStarted
from laasp_ray.run.forking import decides_by_target
from laasp_ray.run.metrics import Measure
from laasp_ray.run.preflight import prepare
from laasp_ray.store.addresses import public_data
from laasp_ray.store.journal import Journal
from laasp_ray.store.ownership import take
from laasp_ray.store.storage import Storage
from laasp_ray.sweep import results
from laasp_ray.sweep.arithmetic import Arithmetic
from laasp_ray.sweep.directors import BracketDirector, Director, LatencyDirector, Record, TargetsDirector
from laasp_ray.sweep.goals import (
    Goal,
    MaxDrop,
    SpaceSearch,
    Targets,
    WithinLatency,
    check_goal,
    checked_targets,
    filter_prune,
    sharing,
)
from laasp_ray.sweep.in_process import run_here
from laasp_ray.sweep.journal import ENDED, FINISHED, STARTED
from laasp_ray.sweep.latency import to_go
from laasp_ray.sweep.on_cluster import DirectedTrials, carry_out
from laasp_ray.sweep.page import SweepPage
from laasp_ray.sweep.shares import Shares, share_out
from laasp_ray.sweep.space import SpaceDirector
from laasp_ray.sweep.targets import runs_for
from laasp_ray.sweep.trials import Outcome, is_finished

logger = logging.getLogger(__name__)

BEST_WITHIN = 1.0
_MOST = 1000
Say = Callable[[str], None]


@dataclass(frozen=True)
class SweepResult:
    """`rows` has one for each trial, `best` the name of the best, `said` the result in a sentence. `content` is that of
    `sweep.json`."""

    folder: str
    rows: tuple[SweepRow, ...]
    best: str | None
    said: str
    content: Mapping[str, Any]

    @property
    def failure(self) -> str:
        """Which trials have no result, and why the first has none; empty if all have one, or were stopped."""
        failed = [row for row in self.rows if not row.is_finished and not row.status.startswith("stopped")]
        if not failed:
            return ""
        return (
            f"{len(failed)} of {counted(len(self.rows), 'trial')} without a result: {failed[0].name}, "
            f"{failed[0].status}; the others are in {self.folder}/sweep.json, and the same command tries again"
        )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@random_state_kept()
def run_sweep(
    config: RunConfig,
    goal: Goal,
    *,
    distributed: bool = True,
    ray_address: str | None = None,
    concurrent: int | None = None,
    best_within: float | None = None,
    say: Say = _to_stderr,
) -> SweepResult:
    """Carries out a sweep, or goes on with the one of that name. What is finished is left as it is.

    `config` is that of a run; its name is the sweep's, and for `MaxDrop` its `prune.flops_reduction` is the deepest
    that is looked at. `concurrent` runs at most are under way at a time; None: as many as fit. With `distributed` False
    everything runs in this process, one trial after the other. `best_within` is for targets: the best one is the
    deepest whose top-1 falls by at most so many points (None: BEST_WITHIN); with a loss of the user's own the deepest
    whose primary metric gets worse by at most so much (None: not at all).

    Raises ConfigError, DataError or StoreError before anything expensive, and SearchError if a trial that others need
    has failed; the same call then goes on. `failure` of the result says which other trials failed.
    """
    config = sharing(config)
    storage = Storage.open(config.storage).child(config.name)
    storage.check_writable()
    if distributed:
        check_address(ray_address)
    _check_storage(storage)
    owner = take(storage, at_least=Journal(storage).last_attempt() + 1)
    try:
        journal = Journal(storage.guarded(owner.ensure), owner)
        begun = _check_same(journal, config, goal)
        settings = begun or _checked(config, goal)
        if begun is not None:
            kept = Arithmetic.from_json(begun["arithmetic"])
            config = replace(config, cluster=kept.kept_by(config.cluster, config.name, ray=distributed))
        outcomes, page = _outcomes_of(journal), SweepPage(storage.guarded(owner.ensure))

        def record(name: str, outcome: Outcome) -> None:
            journal.append(ENDED, {"name": name, "outcome": outcome.to_json()})
            outcomes[name] = outcome
            page.write()

        with _shares(config, goal, distributed, ray_address, concurrent) as (shares, arithmetic):
            if begun is None:
                journal.append(STARTED, {**settings, "arithmetic": arithmetic.to_json()})
            else:
                arithmetic = kept
            with arithmetic.of_driver():
                director = _director(config, goal, settings, shares, record, outcomes)
                if distributed:
                    _on_tune(director, shares, say)
                else:
                    run_here(director, say)
        with arithmetic.of_driver():
            result = _result(storage.guarded(owner.ensure), goal, director, outcomes, best_within, say)
        journal.append(FINISHED, {"best": result.best, "said": result.said})
        page.write()
    finally:
        owner.release()
    return result


def _outcomes_of(journal: Journal) -> dict[str, Outcome]:
    """The outcomes of the trials that have ended so far, by their names."""
    ended = [event.data for event in journal.events() if event.name == ENDED]
    return {data["name"]: Outcome.from_json(data["outcome"]) for data in ended}


def _check_storage(storage: Storage) -> None:
    """Raises ConfigError if the sweep's folder is that of a run."""
    if Journal(storage).last(RunStarted.NAME) is not None:
        raise ConfigError(f"{storage.uri} holds a run, not a sweep: give the sweep another --name")


def _check_same(journal: Journal, config: RunConfig, goal: Goal) -> dict[str, Any] | None:
    """The first event's data, if the sweep has begun. Raises ConfigError, naming the key, if it was asked for something
    else then."""
    event = journal.last(STARTED)
    if event is None:
        return None
    ours = {**public_data(config.to_dict()), "goal": goal.to_json()}
    theirs = {**event.data["config"], "goal": event.data["goal"]}
    if listed := differences(ours, theirs):
        raise ConfigError(
            f"the sweep {config.name!r} in {journal.uri} was started with other settings ({listed}): give the same "
            "ones to go on with it, or another --name"
        )
    if "arithmetic" not in event.data:
        raise ConfigError(f"the sweep in {journal.uri} was begun with an earlier version: give another --name")
    return dict(event.data)


def _checked(config: RunConfig, goal: Goal) -> dict[str, Any]:
    """Checks what the trials will need. The data of the first event, without what depends on the cluster."""
    prepared = prepare(deepest_of(config, goal))
    check_goal(goal, config, len(prepared.test), Measure(*prepared.task.primary))
    data: dict[str, Any] = {"config": public_data(config.to_dict()), "goal": goal.to_json()}
    if isinstance(goal, WithinLatency):
        data["latency_share"] = to_go(config, goal.ms)[1]
    return data


def _director(
    config: RunConfig,
    goal: Goal,
    settings: Mapping[str, Any],
    shares: Shares,
    record: Record,
    outcomes: Mapping[str, Outcome],
) -> Director:
    alone, config = shares.alone, replace(config, cluster=shares.cluster)
    match goal:
        case Targets():
            return TargetsDirector(runs_for(config, goal.flops_reductions), record)
        case MaxDrop():
            return BracketDirector(config, goal, shares.slots, alone, record, outcomes)
        case WithinLatency():
            return LatencyDirector(config, goal, settings["latency_share"], record)
        case SpaceSearch():
            return SpaceDirector(config, goal, record, outcomes)


def deepest_of(config: RunConfig, goal: Goal) -> RunConfig:
    """The run of the sweep that prunes most, as far as that is known."""
    if isinstance(goal, Targets | SpaceSearch):
        share = max(checked_targets(goal.flops_reductions))
        return replace(config, prune=replace(filter_prune(config), flops_reduction=share))
    return config


def all_search(config: RunConfig, goal: Goal) -> bool:
    """Whether every run of the sweep makes decisions of its own, and not only the one that others begin with."""
    return isinstance(goal, SpaceSearch) or decides_by_target(config.prune)


def runs_of(goal: Goal) -> int:
    """The runs that may be under way at a time, however large the cluster."""
    match goal:
        case Targets():
            return len(goal.flops_reductions)
        case SpaceSearch():
            return len(goal.flops_reductions) * goal.trials
        case WithinLatency():
            return 1
        case MaxDrop():
            return _MOST


@contextmanager
def _shares(
    config: RunConfig, goal: Goal, distributed: bool, address: str | None, concurrent: int | None
) -> Iterator[tuple[Shares, Arithmetic]]:
    """How the runs share the cluster, which is connected as long as the context lasts, and what their numbers then
    depend on.
    """
    if not distributed:
        yield Shares(1, config.cluster, config.cluster), Arithmetic.of(None)
        return
    from laasp_ray.distributed import autoscaling, cluster  # Ray takes seconds to import

    grows = check_address(address) != "local"
    with (
        cluster.connected(address) as there,
        autoscaling.with_devices(there, config.cluster, grows=grows) as resources,
    ):
        shares = share_out(resources, config.cluster, runs_of(goal), concurrent, all_search=all_search(config, goal))
        yield shares, Arithmetic.of(shares.cluster, gpus=resources.get("GPU", 0) >= 1)


def _on_tune(director: Director, shares: Shares, say: Say) -> None:
    from laasp_ray.distributed.tuning import run_trials

    if not director.is_done:
        workers = shares.cluster.workers
        say(f"{counted(shares.slots, 'run')} at a time, of {counted(workers, 'worker')} each")
        run_trials(DirectedTrials(director, say), carry_out, shares.slots)


def _result(
    storage: Storage,
    goal: Goal,
    director: Director,
    outcomes: Mapping[str, Outcome],
    best_within: float | None,
    say: Say,
) -> SweepResult:
    """The rows, with latencies measured now, and the files made of them."""
    rows: list[SweepRow] = []
    machine = ""
    finished = [run for run in director.trials if is_finished(run)]
    if finished:
        say(f"measuring the latency of {counted(len(finished), 'network')}")
    for run in director.trials:
        latency = None
        if run in finished:
            latency, machine = results.measured_latency(run, models.build(run.model))
        rows.append(results.row_of(run, outcomes.get(run.name), target_of(goal, run), latency))
    if isinstance(director, SpaceDirector):
        rows = [replace(row, settings=director.settings_of(row.name)) for row in rows]
    best, rule, said = _best(goal, director, rows, best_within)
    content = sweep_json(rows, goal=goal.to_json(), rule=rule, best=best, said=said, machine=machine)
    storage.write("sweep.json", json.dumps(content, indent=2).encode())
    if finished:
        storage.write("pareto.png", pareto_png(rows, best, storage.uri.partition("?")[0].rpartition("/")[2]))
    return SweepResult(storage.uri, tuple(rows), best, said, content)


def target_of(goal: Goal, run: RunConfig) -> str:
    if isinstance(goal, WithinLatency):
        return f"{goal.ms:g} ms"
    return f"{run.prune.targets['FLOPs']:.2%}"


def _best(
    goal: Goal, director: Director, rows: Sequence[SweepRow], within: float | None
) -> tuple[str | None, str, str]:
    """The best row's name, the rule that makes it so, and the result in a sentence."""
    match goal:
        case MaxDrop():
            assert isinstance(director, BracketDirector)
            rule = "the largest reduction of FLOPs " + director.measure.within(goal.points, "the base's")
            met, total = director.bounds.met, director.iterations
            by_number = {int(row.name.rpartition("-")[2]): row for row in rows}
            said = results.bracket_said(
                by_number,
                met,
                total,
                bar=director.bar,
                base=director.base,
                points=goal.points,
                images=results.test_images(director.trajectory),
                measure=director.measure,
            )
            return (by_number[met].name if met else None), rule, said
        case WithinLatency():
            rule = f"the first network of the trajectory whose latency is at most {goal.ms:g} ms"
            best = next((row.name for row in rows if row.is_finished), None)
            row = next((row for row in rows if row.name == best), None)
            if row is None or row.latency_ms is None:
                return None, rule, "no network has a result"
            took, reached = row.latency_ms[1], _reached(row)
            if took > goal.ms:
                return None, rule, f"no network is within {goal.ms:g} ms: {best} takes {took:.2f} ms, {reached}"
            return best, rule, f"{best}: {took:.2f} ms, {reached}"
        case _:
            if within is None:
                within = BEST_WITHIN if measure_of(rows).is_top1 else 0.0
            best, rule = results.best_within(rows, within)
            row = next((row for row in rows if row.name == best), None)
            if row is None:
                return None, rule, "no trial has a result"
            said = f"{best}: {row.flops_reduction or 0:.2%} of FLOPs gone, {_reached(row)}"
            return best, rule, said


def _reached(row: SweepRow) -> str:
    return "not tested" if row.score_after is None else row.measure.text(row.score_after)
