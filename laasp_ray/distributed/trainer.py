"""Training on a cluster: one Ray Train worker group lives as long as the run and gets its training phases as commands.

A group takes 10 to 20 s to start, a further command a fraction of a second. If a rank, its mailbox or its machine is
lost or hangs, another group is started with the workers for which there is room. It continues after the last finished
epoch. The group grows again when there is room, at an epoch's end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray
import torch
from torch import nn

from laasp_ray.config import RunConfig
from laasp_ray.distributed.cluster import ResourcePlan
from laasp_ray.distributed.group import (
    GroupLostError,
    GroupSettings,
    NoRoomError,
    WorkerGroup,
    room_for_trainers,
)
from laasp_ray.distributed.train_worker import PhaseCommand
from laasp_ray.distributed.transfer import pack, unpack
from laasp_ray.distributed.waiting import Waiting
from laasp_ray.errors import LaaspError, TrainingError
from laasp_ray.pruning.network import NetworkState
from laasp_ray.tasks import CLASSIFICATION, Task
from laasp_ray.train.loop import EpochResult, PhaseResult, TrainingPhase
from laasp_ray.train.trainer import OnEpoch

logger = logging.getLogger(__name__)

NO_ROOM_S = 1800.0
"""Training ends after so many seconds without room for any trainer."""
WORTH_GROWING_S = 120.0
"""A group grows if the epochs that are left of the training phase take at least so many seconds."""


class _GroupGrowsError(Exception):
    """There is room for more workers, so a larger group continues."""


class RayTrainer:
    """The Trainer (train/trainer.py) on up to `share.workers` Ray Train workers, with DDP over all of them.

    A global batch has `share.workers` parts, for any number of workers that there is room for (train/step.py).
    """

    def __init__(
        self,
        unpruned: Any,
        config: RunConfig,
        share: ResourcePlan,
        storage_path: str,
        images: tuple[str, str],
        on_fault: Callable[[str], None] = lambda text: None,
        task: Task = CLASSIFICATION,
    ) -> None:
        """`unpruned` is the object reference of the unpruned network. Ray Train's own files go to `storage_path`.

        `images` are the digests of the training and the test images, which every node must have.
        `on_fault` is called for each group that was lost.
        """
        self._on_fault = on_fault
        self._settings = GroupSettings(unpruned, config, share, storage_path, images, task)
        self._group: WorkerGroup | None = None
        self._coming: WorkerGroup | None = None
        self._make_room: Callable[[], None] = lambda: None
        self._commands = 0
        self._teacher: Any = None
        self._last: EpochResult | None = None
        self._epoch_seconds: float | None = None
        self._complaint: str | None = None

    def start(self, make_room: Callable[[], None]) -> None:
        """Starts the worker group, unless there is one. Its workers then hold their shares of the GPUs.

        `make_room` is called when a later group waits long for its GPUs.
        """
        self._group = self._group or self._start()
        self._make_room = make_room

    def nodes(self) -> list[str]:
        """The Ray node of each worker; none while there is no group."""
        return [] if self._group is None else self._group.nodes()

    def set_teacher(self, teacher: NetworkState) -> None:
        self._teacher = ray.put((teacher.plan, pack(teacher.tensors)))

    def run(
        self,
        network: NetworkState,
        optimizer_state: Mapping[str, torch.Tensor],
        training_phase: TrainingPhase,
        on_epoch: OnEpoch,
    ) -> PhaseResult:
        losses = 0
        self._complaint = None
        while True:
            self._last = None
            try:
                return self._run(network, optimizer_state, training_phase, on_epoch)
            except _GroupGrowsError as grows:
                self._end_group()
                logger.warning("%s; the training phase continues with a larger group", grows)
            except GroupLostError as lost:
                self._end_group()
                losses = 1 if self._last is not None else losses + 1  # the count starts again after progress
                said = self._complaint or str(lost)
                if losses > self._settings.config.cluster.worker_failures:
                    times = "once" if losses == 1 else f"{losses} times"
                    raise TrainingError(
                        f"training phase {training_phase.number} ({training_phase.phase}): the workers were lost "
                        f"{times} without finishing an epoch; the last said: {said}"
                    ) from lost
                text = f"the worker group was lost ({said.partition(chr(10))[0]})"
                logger.warning("%s; starting another", text)
                self._on_fault(text)
            if self._last is not None:
                network = NetworkState(network.plan, self._last.tensors)
                optimizer_state = self._last.optimizer_state
                training_phase = replace(training_phase, done=self._last.position + 1)

    def _run(
        self,
        network: NetworkState,
        optimizer_state: Mapping[str, torch.Tensor],
        training_phase: TrainingPhase,
        on_epoch: OnEpoch,
    ) -> PhaseResult:
        if self._group is not None:
            self._grow(self._group, len(training_phase.epochs) - training_phase.done)
        group = self._group = self._group or self._start()
        group.begin()
        self._commands += 1
        # The arrays are one reference, so they are sent once per node and not once per rank.
        reference = ray.put((pack(network.tensors), pack(optimizer_state)))
        payload = PhaseCommand(training_phase, network.plan, [reference], self._teacher)
        group.ask(group.mailbox.submit.remote(self._commands, payload))
        while True:
            kind, value = group.ask(group.mailbox.take.remote())
            if kind == "failed":
                self._end_group()
                raise value if isinstance(value, LaaspError) else TrainingError(str(value))
            if kind == "done":
                return value
            if kind == "complaint":
                self._complaint = value  # its worker ends now, and the group with it
                continue
            arrays, carried_arrays, done = value
            done = replace(done, tensors=unpack(arrays, copy=True), optimizer_state=unpack(carried_arrays, copy=True))
            self._last, self._epoch_seconds = done, done.seconds
            on_epoch(done)
            self._grow(group, len(training_phase.epochs) - done.position - 1)

    def _grow(self, group: WorkerGroup, epochs_left: int) -> None:
        """Raises _GroupGrowsError if more workers have room, and enough is left to train."""
        if group.workers == self._settings.share.workers or self._epoch_seconds is None:
            return
        room = self._room()
        if room > group.workers and epochs_left * self._epoch_seconds >= WORTH_GROWING_S:
            self._make_room()
            raise _GroupGrowsError(f"there is room for {room} trainers, where {group.workers} work")

    def _start(self) -> WorkerGroup:
        """Starts a group of as many workers as there is room for."""
        while True:
            workers = self._wait_for_room()
            group = WorkerGroup(self._settings, workers)
            try:
                group.wait_until_up(self._room, self._make_room)
            except NoRoomError:
                logger.warning("a node is gone: there is no room for %d trainers any more", workers)
                group.abandon()
                continue
            except Exception:
                group.abandon()
                raise
            except BaseException:  # the driver is being stopped and may have seconds only: `close` ends the group
                self._coming = group
                raise
            return group

    def _wait_for_room(self) -> int:
        """The number of workers that there is room for, at least 1 and at most what the run wants."""
        share = self._settings.share
        waiting = Waiting()
        while (room := self._room()) == 0:
            if waiting.seconds > NO_ROOM_S:
                raise TrainingError(
                    f"the cluster has had no room for a trainer for {NO_ROOM_S / 60:.0f} min; one wants "
                    f"{dict(share.trainer_resources)}; start the same command again once there is room"
                )
            if waiting.has_to_be_said():
                logger.warning(
                    "the cluster has had no room for a trainer for %.0f s; one wants %s",
                    waiting.seconds,
                    dict(share.trainer_resources),
                )
            time.sleep(1)
        if room < share.workers:
            logger.warning(
                "there is room for %d of %d trainers; each trains a larger part of every batch, and the result is the "
                "same",
                room,
                share.workers,
            )
        return min(room, share.workers)

    def _room(self) -> int:
        return room_for_trainers(ray.nodes(), self._settings.share)

    def _end_group(self) -> None:
        if self._group is not None:
            self._group.abandon()
            self._group = None

    def close(self) -> None:
        """Stops the workers. Workers that hang in a collective end with the Ray session."""
        if self._coming is not None:
            self._coming.abandon()
        if self._group is not None:
            self._group.close()
            self._group = None


def put_network(unpruned: nn.Module) -> Any:
    """The object reference of the unpruned network, for trainers and executors alike."""
    return ray.put(unpruned)
