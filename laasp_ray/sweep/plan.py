"""What a sweep would do and how long it would take, without doing it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from laasp_ray.config import RunConfig
from laasp_ray.distributed.address import check_address
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.planning.dry_run import Machine, machine_for, seconds_of
from laasp_ray.planning.workload import Workload, workload_of
from laasp_ray.report.durations import format_duration
from laasp_ray.report.sweep import counted
from laasp_ray.report.tables import table_lines
from laasp_ray.run.metrics import Measure
from laasp_ray.run.preflight import Prepared, prepare
from laasp_ray.sweep.goals import Goal, MaxDrop, SpaceSearch, Targets, WithinLatency, check_goal, filter_prune, sharing
from laasp_ray.sweep.latency import to_go
from laasp_ray.sweep.run import all_search, deepest_of, runs_of
from laasp_ray.sweep.shares import Shares, share_out
from laasp_ray.sweep.targets import runs_for

_SHARED = ("train", "iterations", "fine-tune")


@dataclass(frozen=True)
class TrialCost:
    """Seconds of a run: those that it shares with deeper ones, and those of its own after its last prune."""

    name: str
    target: float
    iterations: int
    shared: float
    own: float

    @property
    def alone(self) -> float:
        return self.shared + self.own


def duration(costs: Sequence[TrialCost], slots: int) -> float:
    """Seconds of a sweep over targets in `slots` runs at a time.

    The deepest run takes a slot from the beginning to its end. Each other one can begin once the deepest has spent as
    much as the two share, and takes the first slot that is free then.
    """
    if not costs:
        return 0.0
    deepest = max(costs, key=lambda cost: cost.target)
    free = [deepest.alone, *([0.0] * (slots - 1))]
    heapq.heapify(free)
    for cost in sorted((cost for cost in costs if cost is not deepest), key=lambda cost: cost.target):
        heapq.heappush(free, max(heapq.heappop(free), cost.shared) + cost.own)
    return max(free)


@random_state_kept()
def dry_run(
    config: RunConfig,
    goal: Goal,
    *,
    distributed: bool = True,
    ray_address: str | None = None,
    concurrent: int | None = None,
    repeats: int = 1,
) -> str:
    """The plan of a sweep as text. Makes the sweep's checks, and raises their errors. Stores nothing."""
    config = sharing(config)
    if distributed:
        check_address(ray_address)
    config = deepest_of(config, goal)
    prepared = prepare(config)
    check_goal(goal, config, len(prepared.test), Measure(*prepared.task.primary))
    latency = to_go(config, goal.ms) if isinstance(goal, WithinLatency) else None
    shares = _shares(config, goal, distributed, ray_address, concurrent)
    prepared = replace(prepared, config=replace(config, cluster=shares.cluster))
    machine = machine_for(prepared, distributed=distributed, ray_address=ray_address)
    lines = [f"Dry run of the sweep {config.name}: nothing is trained and nothing stored.", ""]
    if isinstance(goal, MaxDrop):
        lines += _bracket_lines(prepared, goal, machine, shares.slots)
    elif latency is not None:
        lines += _latency_lines(prepared, machine, *latency)
    else:
        lines += _target_lines(prepared, goal, machine, shares.slots)
    if repeats > 1:
        lines += ["", f"{repeats} repeats take {repeats} times as long, one after the other."]
    return "\n".join(lines)


def _shares(config: RunConfig, goal: Goal, distributed: bool, address: str | None, concurrent: int | None) -> Shares:
    if not distributed:
        return Shares(1, config.cluster, config.cluster)
    from laasp_ray.distributed import cluster

    with cluster.connected(address) as resources:
        return share_out(resources, config.cluster, runs_of(goal), concurrent, all_search=all_search(config, goal))


def _cost(prepared: Prepared, run: RunConfig, machine: Machine) -> TrialCost:
    prepared = replace(prepared, config=run)
    workload = workload_of(prepared)
    seconds = _seconds(prepared, workload, machine)
    pruning = workload.pruning
    shared = sum(seconds.get(part, 0.0) for part in _SHARED)
    return TrialCost(
        name=run.name,
        target=run.prune.targets["FLOPs"],
        iterations=0 if pruning is None else pruning.iterations,
        shared=shared,
        own=sum(seconds.values()) - shared,
    )


def _seconds(prepared: Prepared, workload: Workload, machine: Machine) -> Mapping[str, float]:
    return seconds_of(workload, machine, train_images=len(prepared.train), test_images=len(prepared.test))


def _target_lines(prepared: Prepared, goal: Goal, machine: Machine, slots: int) -> list[str]:
    assert isinstance(goal, Targets | SpaceSearch)
    runs = runs_for(prepared.config, goal.flops_reductions)
    costs = [_cost(prepared, run, machine) for run in (*runs.others, runs.deepest)]
    rows = [("trial", "target", "iterations", "shared", "of its own", "as a run alone")]
    for cost in costs:
        shared, own, whole = map(format_duration, (cost.shared, cost.own, cost.alone))
        rows.append((cost.name, f"{cost.target:.2%}", str(cost.iterations), shared, own, whole))
    alone = sum(cost.alone for cost in costs)
    lines = table_lines(rows)
    if isinstance(goal, SpaceSearch):
        total = goal.trials * alone / slots
        return [
            *lines,
            "",
            f"{counted(goal.trials, 'trial')} of each target, each a whole run, since its settings may change its "
            f"prunes: about {format_duration(total)}, {slots} at a time.",
        ]
    total = duration(costs, slots)
    return [
        *lines,
        "",
        f"The prunes are made once, by {runs.deepest.name}; each other trial begins where its target is reached.",
        f"{counted(slots, 'run')} at a time, of {counted(machine.workers, 'worker')} each: at most about "
        f"{format_duration(total)}, where separate runs of as many would take {format_duration(alone)} one after the "
        "other "
        f"({total / alone:.2f} of it)."
        if alone
        else "",
    ]


def _latency_lines(prepared: Prepared, machine: Machine, now: float, share: float) -> list[str]:
    """A plan for a latency of `now` ms of which `share` goes. How it falls with FLOPs is not known before."""
    run = replace(prepared.config, prune=replace(filter_prune(prepared.config), flops_reduction=share))
    cost = _cost(prepared, run, machine)
    each = cost.shared / max(1, cost.iterations)
    rows = [
        ("latency", f"{now:.2f} ms here, of which {share:.1%} is to go: 3% more than asked, since measurements vary"),
        ("trajectory", f"about {cost.iterations} iterations if the latency falls as FLOPs do; it may fall more slowly"),
        ("time, trajectory", f"about {format_duration(cost.shared)} then, {format_duration(each)} an iteration"),
        ("time, the trial", format_duration(cost.own)),
        ("time, all", f"about {format_duration(cost.alone)}, and the measurements of latency"),
    ]
    return table_lines(rows, rule=False, left=(0, 1))


def _bracket_lines(prepared: Prepared, goal: MaxDrop, machine: Machine, slots: int) -> list[str]:
    cost = _cost(prepared, replace(prepared.config, name="trajectory"), machine)
    at_once = max(1, min(slots, cost.iterations))
    rounds = math.ceil(math.log(cost.iterations + 1, at_once + 1)) if cost.iterations else 0
    trials = min(cost.iterations, rounds * at_once)
    total = cost.shared + rounds * cost.own
    rows = [
        ("trajectory", f"about {cost.iterations} iterations to {cost.target:.2%} of FLOPs, once"),
        ("trials", f"about {trials}, {at_once} at a time, each the final training of one of its iterations"),
        ("time, trajectory", format_duration(cost.shared)),
        ("time, a trial", f"at most {format_duration(cost.own)}; one that cannot stay within the drop is stopped"),
        ("time, all", f"at most about {format_duration(total)}"),
        ("by a run each", f"about {format_duration(trials * cost.alone)}"),
    ]
    return table_lines(rows, rule=False, left=(0, 1))
