"""Pieces of work on a data set as Ray tasks, spread over the CPUs of a cluster."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import ray

from laasp_ray.data.shards.tasks import Spread, Task
from laasp_ray.errors import LaaspError

logger = logging.getLogger(__name__)

RETRIES = 3
"""How often a piece is begun again whose worker was lost."""
_AHEAD = 2
"""Pieces handed out for each CPU: one under way, one that waits."""


class LostWorkError(LaaspError):
    """A piece of work was not finished, because its workers were lost again and again."""


def spread_over(slots: int) -> Spread:
    """Does tasks on a cluster with so many CPUs, in the session that is open."""

    def spread(tasks: Iterable[Task]) -> Iterator[Any]:
        return _Spread(tasks, slots).steps()

    return spread


class _Spread:
    def __init__(self, tasks: Iterable[Task], slots: int) -> None:
        self._waiting, self._slots = iter(tasks), slots
        self._running: dict[Any, _Running] = {}

    def steps(self) -> Iterator[Any]:
        """The steps of all tasks as they come. A task whose worker is lost begins again: what it had counted is taken
        back, as a negative number.

        What a task raises is raised here, and ends the others.
        """
        try:
            while self._hand_out():
                ready, _ = ray.wait(list(self._running), num_returns=1)
                for generator in ready:
                    yield from self._step(generator)
        finally:
            for generator in self._running:
                ray.cancel(generator, force=True)

    def _hand_out(self) -> bool:
        """Whether anything is under way."""
        while len(self._running) < _AHEAD * self._slots:
            task = next(self._waiting, None)
            if task is None:
                break
            self._start(_Running(task))
        return bool(self._running)

    def _start(self, running: _Running) -> None:
        self._running[_steps_of.remote(running.task)] = running

    def _step(self, generator: Any) -> Iterator[Any]:
        running = self._running[generator]
        try:
            step = ray.get(next(generator))
        except StopIteration:
            del self._running[generator]
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error.as_instanceof_cause()
            raise cause from error  # which has the worker's own traceback
        except ray.exceptions.RayError as error:
            del self._running[generator]
            running.losses += 1
            if running.losses > RETRIES:
                raise LostWorkError(
                    f"a piece of work was begun {running.losses} times, and its worker was lost each time: {error}; "
                    "see to the memory of the nodes, and start the same command again"
                ) from error
            logger.warning("a worker was lost (%s): its piece begins again", str(error).partition("\n")[0])
            yield -running.counted
            running.counted = 0
            self._start(running)
        else:
            if isinstance(step, int):
                running.counted += step
            yield step


class _Running:
    """A task, how often its worker was lost, and what it has counted since it began."""

    def __init__(self, task: Task) -> None:
        self.task, self.losses, self.counted = task, 0, 0


@ray.remote(num_cpus=1, num_returns="streaming", max_retries=0)
def _steps_of(task: Task) -> Iterator[Any]:
    yield from task.steps()
