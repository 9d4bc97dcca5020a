"""Schedules one iteration's measurements: all candidates on all images, or a race.

Work is cut into units: some candidates on some images. Units are so small that no worker is idle at the end, and so
large that the shared part of the network does not run again for every few candidates. A race proceeds in rounds. While
the last units of a round run, idle workers begin the next round with the candidates that are still in the race. The
choice depends only on complete rounds, so it does not depend on the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np

from laasp_ray.records import MeasuredLoss
from laasp_ray.search.engine import Cost, Losses
from laasp_ray.search.race_memory import RaceMemory
from laasp_ray.search.racing import Race, Request
from laasp_ray.search.stratified import GROWTH

OnResult = Callable[[int, MeasuredLoss], None]
OnShare = Callable[[float], None]

UNITS_PER_SLOT = 4
"""The largest number of units per worker at one time. The last unit to end is then late by a small part of the
whole.
"""
LAST_UNIT = 0.1
"""The expected delay of the last worker, in units. Workers differ in speed, and units in cost."""
HAND_OUT_SECONDS = 0.003
"""The seconds to hand out one unit on a cluster (bench/fanout.py). Units are handed out one after the other."""


@dataclass(frozen=True, eq=False)
class Unit:
    """These tasks (positions) on these images (positions in the calibration set), `fast`: in the fast precision."""

    tasks: tuple[int, ...]
    images: np.ndarray
    fast: bool = False


class WorkBackend(Protocol):
    """Measures units, in this process or on a cluster."""

    @property
    def slots(self) -> int:
        """The number of units that are processed at the same time."""

    def cost(self, task: int) -> Cost: ...

    def submit(self, unit: Unit) -> None: ...

    def collect(self) -> tuple[Unit, Losses]:
        """Waits until one of the submitted units is done."""


@dataclass(frozen=True)
class Settings:
    """`racing` False measures all candidates on all images. With `candidates_per_task` 0 units are sized by
    their cost. With `fast` a race uses the fast precision, if all candidates can be measured in it.
    """

    images: int
    batch_size: int
    candidates_per_task: int = 0
    racing: bool = False
    fast: bool = False
    racing_error: float = 0.01
    racing_margin: float = 0.0
    racing_growth: float = GROWTH
    racing_memory: bool = True
    seed: int = 0


def measure(
    backend: WorkBackend,
    tasks: int,
    settings: Settings,
    on_result: OnResult,
    on_share: OnShare = lambda share: None,
    memory: RaceMemory | None = None,
) -> list[MeasuredLoss]:
    """The losses of the candidates (tasks 0..tasks-2) and of the current network (the last task).

    `on_result` is called with each loss when it is final. `on_share` is called with the share that is done, if there is
    no race. A candidate that failed has loss NaN and an error. A race uses `memory`, and leaves its choice there.
    """
    work = _Work(backend, tasks, settings, on_result)
    if settings.racing and tasks > 2:
        _race(work, tasks - 1, settings, memory if memory is not None and settings.racing_memory else RaceMemory())
    else:
        _exhaust(work, tasks, settings, on_share)
        if memory is not None:
            memory.forget()
    return work.results


def cut(
    costs: Sequence[Cost], tasks: Sequence[int], images: np.ndarray, settings: Settings, slots: int, speed: float
) -> list[Unit]:
    """Units for `tasks` (positions into `costs`) on `images`, most expensive first.

    Images are cut into batches. Candidates are cut into the number of groups with the shortest expected time.
    Candidates that branch off at about the same depth stay together, because every group repeats the part that its
    candidates share. `speed` is in multiply-accumulates a second; 0 if not known.
    """
    pieces = np.array_split(images, math.ceil(len(images) / settings.batch_size))
    shared = max(costs[task].shared for task in tasks)
    own = sum(costs[task].own for task in tasks)
    hand_out = HAND_OUT_SECONDS * speed * len(pieces) / len(images)  # in units of one image's cost

    def end_with(groups: int) -> float:
        units, unit = len(pieces) * groups, shared + own / groups
        begun = min(units, slots) * hand_out
        return max(begun + math.ceil(units / slots) * unit, units * hand_out + unit) + LAST_UNIT * unit

    most = min(len(tasks), math.ceil(slots * UNITS_PER_SLOT / len(pieces)))
    # A single worker is never idle, and every cut makes it repeat the shared part.
    groups = min(range(1, most + 1), key=end_with) if slots > 1 else 1
    if settings.candidates_per_task:
        groups = max(groups, math.ceil(len(tasks) / settings.candidates_per_task))
    parts = _groups(costs, tasks, groups, settings.candidates_per_task)
    units = [Unit(tuple(part), piece) for part in parts for piece in pieces]
    return sorted(units, key=lambda unit: -len(unit.images) * sum(costs[task].own for task in unit.tasks))


def _groups(costs: Sequence[Cost], tasks: Sequence[int], groups: int, most: int) -> list[list[int]]:
    """Tasks in groups of about equal cost, ordered by the depth at which they branch off, at most `most` in each."""
    ordered = sorted(tasks, key=lambda task: (costs[task].shared, task))
    share = sum(costs[task].own for task in ordered) / groups
    parts: list[list[int]] = []
    filled = 0.0
    for task in ordered:
        if not parts or (most and len(parts[-1]) == most) or filled >= share * len(parts):
            parts.append([])
        parts[-1].append(task)
        filled += costs[task].own
    return parts


class _Work:
    """The results so far. `values` (tasks, images) are NaN where nothing is measured, `fast` those of the fast
    precision.
    """

    def __init__(self, backend: WorkBackend, tasks: int, settings: Settings, on_result: OnResult) -> None:
        self._backend, self._settings, self._on_result = backend, settings, on_result
        self.costs = [backend.cost(task) for task in range(tasks)]
        self.values = np.full((tasks, settings.images), np.nan, np.float32)
        self.fast = self.values.copy()
        self._asked = {fast: np.zeros(self.values.shape, bool) for fast in (False, True)}
        self._done = {fast: np.zeros(self.values.shape, bool) for fast in (False, True)}
        self.under_way = 0
        self.errors: dict[int, str] = {}
        self.results: list[MeasuredLoss] = [MeasuredLoss(math.nan, 0, 0.0)] * tasks
        self._seconds = np.zeros(tasks)
        self._worked = self._busy = 0.0

    @property
    def slots(self) -> int:
        return self._backend.slots

    def ask(self, tasks: Sequence[int], images: np.ndarray, fast: bool = False) -> None:
        """Submits what of this was not asked for before."""
        missing: dict[bytes, list[int]] = {}
        for task in tasks:
            missing.setdefault((~self._asked[fast][task, images]).tobytes(), []).append(task)
        for key, some in missing.items():
            new = images[np.frombuffer(key, bool)]
            if len(new):
                self._submit(some, new, fast)
                self._asked[fast][np.array(some)[:, None], new] = True

    def is_done(self, tasks: Sequence[int], images: np.ndarray, fast: bool = False) -> bool:
        return bool(self._done[fast][np.array(tasks)[:, None], images].all())

    def losses(self, tasks: Sequence[int], images: np.ndarray, fast: bool = False) -> np.ndarray:
        return (self.fast if fast else self.values)[np.array(tasks)[:, None], images]

    def _submit(self, tasks: Sequence[int], images: np.ndarray, fast: bool) -> None:
        speed = self._worked / self._busy if self._busy else 0.0
        for unit in cut(self.costs, tasks, images, self._settings, self._backend.slots, speed):
            self._backend.submit(replace(unit, fast=fast))
            self.under_way += 1

    def collect(self) -> Unit:
        unit, losses = self._backend.collect()
        rows = np.array(unit.tasks)
        (self.fast if unit.fast else self.values)[rows[:, None], unit.images] = losses.values
        self._done[unit.fast][rows[:, None], unit.images] = True
        self.under_way -= 1
        self.errors.update({unit.tasks[row]: error for row, error in losses.errors.items()})
        own = np.array([self.costs[task].own for task in unit.tasks], float)
        self._seconds[rows] += losses.seconds * own / own.sum()
        self._worked += len(unit.images) * (own.sum() + max(self.costs[task].shared for task in unit.tasks))
        self._busy += losses.seconds
        return unit

    def finish(self, task: int, loss: float, images: int, dropped_at: int | None = None) -> None:
        # An error on images that the race did not need does not count, because other workers would not have seen it.
        error = "" if math.isfinite(loss) else self.errors.get(task, "")
        seconds, copied = float(self._seconds[task]), self.costs[task].copied
        self.results[task] = MeasuredLoss(loss, images, seconds, dropped_at, error, copied)
        self._on_result(task, self.results[task])


def _exhaust(work: _Work, tasks: int, settings: Settings, on_share: OnShare) -> None:
    work.ask(range(tasks), np.arange(settings.images))
    units = work.under_way
    left = np.full(tasks, settings.images)
    while work.under_way:
        done = work.collect()
        on_share(1 - work.under_way / units)
        left[list(done.tasks)] -= len(done.images)
        for task in done.tasks:
            if left[task] == 0:
                work.finish(task, float(work.values[task].mean(dtype=np.float64)), settings.images)


def _race(work: _Work, candidates: int, settings: Settings, memory: RaceMemory) -> None:
    unchanged, everything = [candidates], np.arange(settings.images)
    fast = settings.fast and not any(cost.copied for cost in work.costs)
    base = remembered = memory.of(settings.images, fast)
    if base is None:
        work.ask(unchanged, everything, fast)
        while work.under_way:
            work.collect()
        base = work.losses(unchanged, everything, fast)[0]
    own = float(base.mean(dtype=np.float64))
    margin = settings.racing_margin * own if settings.racing_margin else 0.0
    race = Race(
        base,
        candidates,
        error=settings.racing_error,
        margin=margin,
        growth=settings.racing_growth,
        seed=settings.seed,
        fast=fast,
    )
    is_estimate, first = fast or remembered is not None, race.sample.images(1)
    if is_estimate:
        work.ask(unchanged, first)  # the race need not wait for it
    else:
        work.finish(candidates, own, settings.images)

    def in_fast(request: Request) -> bool:
        return fast and request.kind != "full"

    while requests := race.requests():
        for request in requests:
            work.ask(request.candidates, request.images, in_fast(request))
        next_round = race.rounds + int(requests[0].kind == "round")
        is_next = next_round < len(race.sample.rounds)
        ahead = iter(_likeliest_first(race) if is_next else ())
        for request in requests:
            while not work.is_done(request.candidates, request.images, in_fast(request)):
                # Idle workers begin with the next round, with the candidates that will most likely need it.
                some = list(islice(ahead, max(0, work.slots - work.under_way)))
                if some:
                    work.ask(some, race.sample.rounds[next_round], fast)
                work.collect()
        for request in requests:
            losses = work.losses(request.candidates, request.images, in_fast(request))
            for task in race.finish(request, losses):
                work.finish(task, race.loss(task), int(race.images[task]), race.rounds)
    for task in race.survivors:
        work.finish(task, race.loss(task), int(race.images[task]))
    memory.losses, memory.fast = None, fast
    if race.choice is not None:
        memory.losses = work.losses([race.choice], everything, fast)[0]
    while work.under_way:  # also units of a round that is no longer needed
        work.collect()
    if is_estimate:
        changes = work.losses(unchanged, first).astype(np.float64) - base[first]
        own += float(race.sample.means(changes, 1)[0])
        work.finish(candidates, own, settings.images if remembered is None else len(first))


def _likeliest_first(race: Race) -> list[int]:
    """The candidates of this round. Those that will most likely be in the next round come first."""
    return sorted(race.sampled, key=lambda task: (np.nan_to_num(race.estimates[task], nan=0.0), task))
