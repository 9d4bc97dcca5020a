"""The driver's side of the search workers, one per device: a queue of jobs, and who works on which.

A worker that is lost or late is replaced, and its jobs go to other workers. The number of workers follows the cluster:
a replacement without room waits for it, while the others work on.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from laasp_ray.distributed.cluster import ResourcePlan
from laasp_ray.distributed.places import Place, kill_at, near
from laasp_ray.distributed.search_worker import SearchWorker
from laasp_ray.distributed.versions import installed
from laasp_ray.distributed.waiting import Waiting
from laasp_ray.errors import LaaspError, MemoryShortError, SearchError

JOB_RETRIES = 5
"""How often a job is given to another worker, after its worker was lost or short of memory."""
AHEAD = 2
"""The jobs that a worker has at a time, so that it need not wait for the next one."""
NO_WORKER_S = 1800.0
"""The search ends after so many seconds without any worker."""
LATE_FACTOR, LATE_S, FIRST_LATE_S = 10.0, 60.0, 900.0
"""A job is late after LATE_FACTOR times the usual seconds, at least LATE_S. The first job of a kind, and the first of a
worker, which loads the network and the images, is late after FIRST_LATE_S."""
SLOW_FACTOR, SLOW_S = 3.0, 5.0
"""An idle worker repeats a job that takes SLOW_FACTOR times the usual seconds, at least SLOW_S."""
REST_S = 60.0
WHOLE = 1.0
GROW_S = 10.0
"""Seconds between two looks for new devices."""
SEE_ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
_TICK_S = 5.0

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A call of `function(*arguments)` for any worker.

    `what` and `remedy` are for error messages. `cost` is relative to other jobs of the same function. A job that was
    collected has a `value` or an `error`: what its function raised, or a SearchError after too many lost workers.
    """

    function: Callable[..., Any]
    arguments: Sequence[Any]
    what: str
    remedy: str
    cost: float = 1.0
    value: Any = None
    error: Exception | None = None
    done: bool = False
    losses: int = 0

    def result(self) -> Any:
        """Its value; raises its error."""
        if self.error is not None:
            raise self.error
        return self.value


@dataclass(eq=False)
class _Worker:
    """`node` is that of the trainer whose GPU it shares. `place` is None until the worker is up, which `coming` tells.
    `given` are its jobs; it works on the first one since `since`.
    """

    actor: Any
    gpu_share: float
    node: str | None
    coming: Any
    place: Place | None = None
    given: deque[tuple[Any, Job]] = field(default_factory=deque)
    since: float = 0.0
    is_new: bool = True


class SearchWorkers:
    """One worker per device of the cluster. They are started with the first job."""

    def __init__(
        self,
        share: ResourcePlan,
        clock: Callable[[], float] = time.monotonic,
        on_fault: Callable[[str], None] = lambda text: None,
        trainers: Callable[[], Sequence[str]] = lambda: (),
    ) -> None:
        """`on_fault` is called for each worker that was lost. `trainers` gives the Ray node of each of this run's."""
        self._share, self._clock, self._on_fault, self._trainers = share, clock, on_fault, trainers
        self._workers: list[_Worker] = []
        self._todo: deque[Job] = deque()
        self._finished: deque[Job] = deque()
        self._seconds: dict[Callable[..., Any], list[float]] = defaultdict(list)  # by cost
        self._failed_starts = 0
        self._grown_at = 0.0

    @property
    def slots(self) -> int:
        """The number of devices, and so of jobs that run at the same time."""
        return slots_of(ray.cluster_resources(), self._share)

    def submit(self, job: Job) -> Job:
        if not self._workers or self._clock() - self._grown_at > GROW_S:
            self._grow()
        self._todo.append(job)
        self._hand_out()
        return job

    def collect(self) -> Job:
        """Waits for the next finished job, in any order. Raises SearchError if no worker comes up."""
        waiting = Waiting(self._clock)
        while not self._finished:
            self._hand_out()
            self._wait()
            if any(worker.place for worker in self._workers):
                waiting.restart()
            elif waiting.seconds > NO_WORKER_S:
                raise SearchError(
                    f"no search worker came up for {NO_WORKER_S / 60:.0f} min; one wants {self._wants()}, free in the "
                    f"cluster: {ray.available_resources()}; start the same command again once there is room"
                )
            elif waiting.has_to_be_said():
                logger.warning(
                    "no search worker has come up for %.0f s; one wants %s, free in the cluster: %s",
                    waiting.seconds,
                    self._wants(),
                    ray.available_resources(),
                )
        return self._finished.popleft()

    def in_order(self, jobs: Iterator[Job], ahead: int) -> Iterator[Any]:
        """Yields the values of `jobs` in their order. At most `ahead` jobs are submitted at a time."""
        asked: deque[Job] = deque()
        try:
            while True:
                while len(asked) < ahead and (job := next(jobs, None)) is not None:
                    asked.append(self.submit(job))
                if not asked:
                    return
                first = asked.popleft()
                while not first.done:
                    self.collect()
                self._finished = deque(job for job in self._finished if job is not first)
                yield first.result()
        finally:
            self.drop()

    def call(self, job: Job) -> Any:
        """The value of one job. Raises its error."""
        return next(self.in_order(iter([job]), 1))

    def drop(self) -> None:
        """Forgets the jobs that are not done. Running ones end by themselves; their values are ignored."""
        for job in (*self._todo, *(job for worker in self._workers for _, job in worker.given)):
            job.done = True
        self._todo.clear()
        self._finished.clear()

    def rest(self) -> None:
        """Frees the memory of the iteration's network in all workers. Waits at most REST_S."""
        resting = [worker.actor.rest.remote() for worker in self._workers if worker.place]
        if resting:
            ray.wait(resting, num_returns=len(resting), timeout=REST_S)

    def make_room(self) -> None:
        """Ends the workers that hold a whole GPU, for trainers that wait for one. The next job starts them again."""
        for worker in [worker for worker in self._workers if worker.gpu_share == WHOLE]:
            ray.kill(worker.actor)
            self._workers.remove(worker)

    def close(self) -> None:
        self.drop()
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers.clear()

    def _wants(self) -> Mapping[str, Any]:
        return self._share.task_options

    def _grow(self) -> None:
        """Starts a worker for every device without one."""
        self._grown_at = self._clock()
        for number in range(len(self._workers), self.slots):
            # A worker beside a trainer takes a task's share. One on a GPU without a trainer takes all of it, so that
            # Ray places no second worker there.
            alone = self._share.gpus and number >= self._share.workers
            self._start(WHOLE if alone else self._share.task_options.get("num_gpus", 0.0))

    def _start(self, gpu_share: float) -> None:
        options = dict(self._share.task_options)
        if self._share.gpus:
            # A process that lives on cannot change its first CUDA_VISIBLE_DEVICES: it sees all GPUs, and is given one.
            options |= {"num_gpus": gpu_share, "runtime_env": {"env_vars": SEE_ALL_GPUS}}
        node = self._beside() if self._share.gpus and gpu_share != WHOLE else None
        where = "SPREAD" if node is None else near(node)
        actor = (
            ray.remote(SearchWorker).options(scheduling_strategy=where, max_restarts=0, **options).remote(installed())
        )
        self._workers.append(_Worker(actor, gpu_share, node, actor.place.remote()))

    def _beside(self) -> str | None:
        """The node of a trainer that no worker of ours is beside yet. Beside another run's, or where its trainers are
        still to come, a worker would take what that run counts on.
        """
        left = Counter(self._trainers()) - Counter(worker.node for worker in self._workers if worker.node)
        return next(iter(left), None)

    def _hand_out(self) -> None:
        """Gives jobs to the workers with the fewest. Idle workers repeat jobs that wait at others or are slow there."""
        while self._todo:
            worker = min((w for w in self._workers if w.place), key=lambda w: len(w.given), default=None)
            if worker is None or len(worker.given) >= AHEAD:
                return
            self._give(worker, self._todo.popleft())
        for worker in self._workers:
            if worker.place and not worker.given:
                job = next((job for job in self._behind() if not job.done and self._is_given(job) == 1), None)
                if job is not None:
                    self._give(worker, job)

    def _behind(self) -> Iterator[Job]:
        """Jobs that another worker may finish sooner: those that wait, and those that are slow."""
        for worker in self._workers:
            if worker.given:
                (_, first), *waiting = worker.given
                yield from (job for _, job in waiting)
                known = self._seconds[first.function]
                usual = first.cost * statistics.median(known) if known else FIRST_LATE_S
                if self._clock() - worker.since > max(SLOW_S, SLOW_FACTOR * usual):
                    yield first

    def _is_given(self, job: Job) -> int:
        """The number of workers that have this job."""
        return sum(job is other for worker in self._workers for _, other in worker.given)

    def _give(self, worker: _Worker, job: Job) -> None:
        if not worker.given:
            worker.since = self._clock()
        worker.given.append((worker.actor.run.remote(job.function, job.arguments), job))

    def _wait(self) -> None:
        """Waits for news of a worker or a job, at most _TICK_S, and handles it."""
        coming = {worker.coming: worker for worker in self._workers if worker.place is None}
        given = {reference: worker for worker in self._workers for reference, _ in worker.given}
        ready, _ = ray.wait([*coming, *given], num_returns=1, timeout=_TICK_S) if coming or given else ([], [])
        for reference in ready:
            if reference in coming:
                self._came_up(coming[reference])
            else:
                self._answered(given[reference], reference)
        self._replace_late()

    def _came_up(self, worker: _Worker) -> None:
        try:
            worker.place = ray.get(worker.coming)
            self._failed_starts = 0
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, LaaspError):  # another one would be refused, too
                raise cause from error
            self._failed_starts += 1
            if self._failed_starts > JOB_RETRIES:
                raise SearchError(
                    f"search workers cannot be started ({self._failed_starts} in a row): {error}"
                ) from error
            logger.warning("a search worker did not come up (%s): starting another", error)
            self._replace(worker)

    def _answered(self, worker: _Worker, reference: Any) -> None:
        job = next(job for known, job in worker.given if known == reference)
        try:
            value = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error.as_instanceof_cause()
            cause.__cause__ = error  # which has the worker's own traceback
            self._take(worker, reference)
            if isinstance(cause, MemoryShortError) and job.losses < JOB_RETRIES:
                job.losses += 1  # another device may have more memory, or this one later
                self._todo.append(job)
            else:
                self._finish(job, error=cause)
        except ray.exceptions.RayError as error:
            self._lose(worker, error)
        else:
            seconds = self._clock() - worker.since
            self._take(worker, reference)
            worker.is_new = False
            self._seconds[job.function].append(seconds / job.cost)
            self._finish(job, value=value)

    def _take(self, worker: _Worker, reference: Any) -> None:
        worker.given = deque(pair for pair in worker.given if pair[0] != reference)
        worker.since = self._clock()

    def _finish(self, job: Job, value: Any = None, error: Exception | None = None) -> None:
        if not job.done:
            job.value, job.error, job.done = value, error, True
            self._finished.append(job)

    def _lose(self, worker: _Worker, error: Exception) -> None:
        """Replaces a worker and queues its jobs again. The loss counts for the job that it worked on."""
        text = f"a search worker is lost ({worker.place}): {_first_line(error)}"
        logger.warning("%s; its work goes to others", text)
        self._on_fault(text)
        self._replace(worker)
        for position, (_, job) in enumerate(worker.given):
            job.losses += position == 0
            if job.done or self._is_given(job):
                continue
            if job.losses > JOB_RETRIES:
                lost = SearchError(
                    f"{job.what} was not finished (what a lost worker was at is tried {JOB_RETRIES + 1} times): "
                    f"{error}; if its worker ran out of memory, {job.remedy}"
                )
                self._finish(job, error=lost)
            else:
                self._todo.appendleft(job)

    def _replace(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        ray.kill(worker.actor)
        self._start(worker.gpu_share)

    def _replace_late(self) -> None:
        now = self._clock()
        for worker in list(self._workers):
            if worker.place is None or not worker.given:
                continue
            _, job = worker.given[0]
            late = FIRST_LATE_S if worker.is_new else self._late_after(job)
            if now - worker.since > late:
                kill_at(worker.place)
                self._lose(
                    worker, TimeoutError(f"no answer for {now - worker.since:.0f} s, where {late:.0f} s are long")
                )

    def _late_after(self, job: Job) -> float:
        known = self._seconds[job.function]
        return max(LATE_S, LATE_FACTOR * job.cost * statistics.median(known)) if known else FIRST_LATE_S


def slots_of(resources: Mapping[str, float], share: ResourcePlan) -> int:
    """The number of search workers in a cluster with these resources: one for each device, at most what is asked."""
    devices = max(1, int(resources.get("GPU" if share.gpus else "CPU", 0)))
    return min(devices, share.search_workers or devices)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
