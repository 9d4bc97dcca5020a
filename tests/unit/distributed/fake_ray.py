"""A cluster in this process for tests of the search's workers: actors whose calls end when the test says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import ray.exceptions

from laasp_ray.distributed.places import Place


class Reference:
    """A call: carried out when it is first looked at, unless its actor is dead, or hangs."""

    def __init__(self, actor: FakeActor | None, work: Callable[[], Any], is_job: bool = False) -> None:
        self.actor, self._work, self._outcome, self.is_job = actor, work, None, is_job

    @property
    def is_ready(self) -> bool:
        return self.actor is None or self.actor.dead or not self.actor.hangs

    def get(self) -> Any:
        if self.actor is not None and self.actor.dead:
            raise ray.exceptions.RayActorError()
        if self._outcome is None:
            self._outcome = (self._work(),)
        return self._outcome[0]


class _Method:
    def __init__(self, actor: FakeActor, work: Callable[..., Any]) -> None:
        self._actor, self._work = actor, work

    def remote(self, *arguments: Any) -> Reference:
        is_job = self._work == self._actor._run
        return self._actor.cluster.called(Reference(self._actor, lambda: self._work(*arguments), is_job))


class FakeActor:
    """`hangs`: answers nothing from now on. `dead`: its calls raise."""

    def __init__(self, cluster: FakeRay, number: int, options: dict[str, Any]) -> None:
        self.cluster, self.number, self.options = cluster, number, options
        self.hangs = self.dead = False
        self.place = _Method(self, lambda: Place(f"node{number}", "10.0.0.1", 1000 + number, (), "cpu"))
        self.run = _Method(self, self._run)
        self.rest = _Method(self, lambda: None)

    def _run(self, function: Callable[..., Any], arguments: Any) -> Any:
        self.cluster.ran.append(self.number)
        try:
            return function(*arguments)
        except ray.exceptions.RayError:
            raise  # the worker died of it
        except Exception as error:
            raise ray.exceptions.RayTaskError("run", "traceback", error) from error


class FakeRay:
    """Stands for the module `ray` in search_workers and importance. `devices` CPUs or GPUs; `room`: workers that come
    up.
    """

    exceptions = ray.exceptions

    def __init__(self, devices: int, room: int | None = None) -> None:
        self.devices, self.room = devices, devices if room is None else room
        self.actors: list[FakeActor] = []
        self.killed: list[Any] = []
        self.ran: list[int] = []
        self.waits = 0
        self.most = 0
        self.now = 0.0
        self._numbers = itertools.count(1)
        self._open: list[Reference] = []

    def clock(self) -> float:
        return self.now

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.devices), "GPU": float(self.devices)}

    def available_resources(self) -> dict[str, float]:
        return {}

    def remote(self, what: Any) -> Any:
        cluster = self

        class Maker:
            def options(self, **options: Any) -> Maker:
                self._options = options
                return self

            def remote(self, *arguments: Any) -> Any:
                actor = FakeActor(cluster, next(cluster._numbers), self._options)
                alive = sum(not other.dead for other in cluster.actors)
                actor.hangs = alive >= cluster.room  # it waits for room
                cluster.actors.append(actor)
                return actor

        return Maker()

    def called(self, reference: Reference) -> Reference:
        self._open.append(reference)
        return reference

    def wait(self, references: list[Reference], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.waits += 1
        self.most = max(self.most, len(references))
        ready = [reference for reference in references if reference.is_ready][:num_returns]
        self.now += 0.0 if ready else timeout
        return ready, [reference for reference in references if reference not in ready]

    def get(self, reference: Any) -> Any:
        return reference.get()

    def put(self, value: Any) -> Reference:
        return Reference(None, lambda: value)

    def kill(self, actor: FakeActor) -> None:
        actor.dead = True
        waiting = [other for other in self.actors if other.hangs and not other.dead]
        if waiting and sum(not other.dead and not other.hangs for other in self.actors) < self.room:
            waiting[0].hangs = False
