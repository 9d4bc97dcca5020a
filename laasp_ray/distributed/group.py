"""A Ray Train worker group as the driver sees it: started, asked, watched, and ended, even if its processes hang."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from laasp_ray.config import RunConfig
from laasp_ray.distributed.cluster import ResourcePlan
from laasp_ray.distributed.deadlines import LOOK_S, Deadlines
from laasp_ray.distributed.mailbox import Mailbox
from laasp_ray.distributed.places import kill_at
from laasp_ray.distributed.torch_backend import NodeTorchConfig
from laasp_ray.distributed.train_worker import train_worker
from laasp_ray.distributed.versions import installed
from laasp_ray.distributed.waiting import Waiting
from laasp_ray.tasks import CLASSIFICATION, Task

logger = logging.getLogger(__name__)

MAILBOX_S = 60.0
"""A mailbox without an answer for so many seconds is given up, with its group."""
COMING_S = 900.0
"""A group of which no worker has come up for so many seconds is given up."""
NODES_S = 30.0
ENDING_S = 20.0
"""Seconds that an abandoned group gets to free its share of the cluster."""

TRAIN_ENVIRONMENT = {
    # Without these, starting and stopping the group take half as long again.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


class GroupLostError(Exception):
    """The worker group or its mailbox is lost for good. A new group may succeed."""


class NoRoomError(Exception):
    """The cluster has less room than a group that is starting wants."""


@dataclass(frozen=True)
class GroupSettings:
    """What every group of a run gets: the reference of the unpruned network, the config, the plan of the resources, a
    folder for Ray Train's own files, the digests of the driver's training and test images, and the task.
    """

    unpruned: Any
    config: RunConfig
    share: ResourcePlan
    storage_path: str
    images: tuple[str, str]
    task: Task = CLASSIFICATION


class WorkerGroup:
    """`workers` Ray Train workers, which wait for commands at a mailbox of their own.

    Ray Train's own restarts are not used: they want as many workers as before, and a lost machine has taken its with
    it.
    """

    def __init__(self, settings: GroupSettings, workers: int) -> None:
        os.environ.update({key: os.environ.get(key, value) for key, value in TRAIN_ENVIRONMENT.items()})
        self.workers = workers
        self._deadlines = Deadlines()
        self._look: tuple[Any, float] | None = None
        self._looked_at = time.monotonic()
        config, share = settings.config, settings.share
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_concurrency": 10_000, "scheduling_strategy": here}
        self.mailbox = ray.remote(Mailbox).options(**options).remote()
        trainer = ray.train.torch.TorchTrainer(
            train_worker,
            train_loop_config={
                "mailbox": self.mailbox,
                "unpruned": [settings.unpruned],
                "config": config,
                "parts": share.workers,
                "threads": share.trainer_threads,
                "versions": installed(),
                "images": settings.images,
                "task": settings.task,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=share.gpus > 0,
                resources_per_worker=share.trainer_resources,
                # Trainers on CPUs hold a small share, so a node would take them all.
                placement_strategy="PACK" if share.gpus else "SPREAD",
            ),
            torch_config=NodeTorchConfig(),
            run_config=ray.train.RunConfig(
                # Ray Train resumes by itself under a known name, but only our own store decides where to resume.
                name=f"{config.name}-{uuid.uuid4().hex[:8]}",
                storage_path=settings.storage_path,
                failure_config=ray.train.FailureConfig(max_failures=0),
            ),
        )
        self._failure: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:  # the thread that waits for the group reports it
                self._failure.append(error)

        self._thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        self._thread.start()

    def wait_until_up(self, room: Callable[[], int], when_late: Callable[[], None]) -> None:
        """Waits until the first worker has come up.

        `room` is the number of workers that the cluster could hold if nothing else ran there. `when_late` is called
        whenever it takes another SAY_S. Raises NoRoomError if the room is too small, GroupLostError if the group dies.
        """
        waiting = Waiting()

        def check() -> None:
            if room() < self.workers:
                raise NoRoomError
            text = (
                f"no trainer has come up for {waiting.seconds:.0f} s; {self.workers} are wanted, free in the cluster: "
            )
            if waiting.seconds > COMING_S:
                raise GroupLostError(text + str(ray.available_resources()))
            if waiting.has_to_be_said():
                when_late()
                logger.warning("%s%s", text, ray.available_resources())

        self.ask(self.mailbox.met.remote(), check)

    def begin(self) -> None:
        """A command is about to be given: deadlines count from now on."""
        self._deadlines.restart()

    def ask(self, reference: Any, check: Callable[[], None] = lambda: None) -> Any:
        """The result of `reference`. Raises GroupLostError if the group dies or hangs, because no result would come.

        `check` is called every LOOK_S meanwhile.
        """
        while True:
            ready, _ = ray.wait([reference], timeout=0.5)
            if ready:
                try:
                    return ray.get(reference)
                except ray.exceptions.RayActorError as error:
                    raise GroupLostError(f"its mailbox died: {error}") from error
            if not self._thread.is_alive():
                raise GroupLostError(_last_line(self._failure[0]) if self._failure else "it ended by itself")
            self._watch(check)

    def _watch(self, check: Callable[[], None]) -> None:
        """Looks at the heartbeats. Raises GroupLostError, naming who is late."""
        now = time.monotonic()
        if self._look is None:
            if now - self._looked_at < LOOK_S:
                return
            check()
            self._look = (self.mailbox.beats.remote(), now)
        reference, since = self._look
        ready, _ = ray.wait([reference], timeout=0)
        if not ready:
            if now - since > MAILBOX_S:
                raise GroupLostError(f"its mailbox has not answered for {now - since:.0f} s")
            return
        self._look, self._looked_at = None, now
        try:
            self._deadlines.look(ray.get(reference))
        except ray.exceptions.RayActorError as error:
            raise GroupLostError(f"its mailbox died: {error}") from error
        late = self._deadlines.late()
        if late:
            raise GroupLostError("; ".join(map(str, late)))

    def nodes(self) -> list[str]:
        """The Ray node of each worker. Of a group that is lost, or has not posted all heartbeats after NODES_S, those
        that are known.
        """
        began = time.monotonic()
        known: list[str] = []
        with contextlib.suppress(GroupLostError):
            while True:
                known = [beat.place.node_id for beat in self.ask(self.mailbox.beats.remote()).values()]
                if len(known) == self.workers or time.monotonic() - began > NODES_S:
                    break
                time.sleep(0.1)
        return known

    def abandon(self) -> None:
        """Ends the group's processes without asking them: some may hang, others wait for those.

        Waits ENDING_S until its share of the cluster is free.
        """
        for place in self._deadlines.places:
            kill_at(place)
        ray.kill(self.mailbox)  # workers that have not been heard of end by themselves without it
        self._thread.join(timeout=ENDING_S)

    def close(self) -> None:
        """Stops the workers, which wait for a command."""
        try:
            ray.get(self.mailbox.stop.remote(), timeout=10)
        except ray.exceptions.RayError as error:
            logger.warning("the trainers' mailbox did not answer while closing: %s", error)
        self._thread.join(timeout=30)


def room_for_trainers(nodes: Sequence[Mapping[str, Any]], share: ResourcePlan) -> int:
    """The number of trainers that the nodes (`ray.nodes()`) which are alive could hold."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return int(sum(math.floor(resources.get("GPU" if share.gpus else "CPU", 0)) for resources in alive))


def _last_line(error: BaseException) -> str:
    """What an error of Ray says in the end: the tracebacks of other processes come first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
