"""Training on a cluster: one Ray Train worker group lives as long as the run and gets its training phases as commands.

A `fit()` takes 15 to 20 s, and a further command a fraction of a second. If a rank is lost, Ray Train restarts the
group; if more is lost, this module starts a new one. In both cases the training phase continues after its last finished
epoch.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from laasp_ray.config import RunConfig
from laasp_ray.distributed.cluster import ResourcePlan
from laasp_ray.distributed.mailbox import Mailbox
from laasp_ray.distributed.train_worker import PhaseCommand, train_worker
from laasp_ray.distributed.transfer import pack, unpack
from laasp_ray.errors import LaaspError, TrainingError
from laasp_ray.pruning.network import NetworkState
from laasp_ray.train.loop import EpochResult, PhaseResult, TrainingPhase
from laasp_ray.train.trainer import OnEpoch

logger = logging.getLogger(__name__)

GROUP_RESTARTS = 8
"""The number of times that Ray Train may restart a group. The mailbox counts the restarts without progress."""

GROUP_ATTEMPTS = 2
"""The number of times that a whole worker group, with its mailbox, is started without a finished epoch."""

PATIENCE_S = 60

TRAIN_ENVIRONMENT = {
    # Without these, starting and stopping the group take half as long again.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


class _GroupLostError(Exception):
    """The worker group or its mailbox is lost for good. A new group may succeed."""


@dataclass
class _Group:
    mailbox: Any
    thread: threading.Thread
    failure: list[BaseException]


class RayTrainer:
    """The Trainer (train/trainer.py) on `share.workers` Ray Train workers, with DDP over all of them."""

    def __init__(self, unpruned: Any, config: RunConfig, share: ResourcePlan, storage_path: str) -> None:
        """`unpruned` is the object reference of the unpruned network. Ray Train's own files go to `storage_path`."""
        self._unpruned, self._config, self._share, self._storage_path = unpruned, config, share, storage_path
        self._group: _Group | None = None
        self._make_room: Callable[[], None] = lambda: None
        self._commands = 0
        self._teacher: Any = None

    def start(self, make_room: Callable[[], None]) -> None:
        """Starts the worker group, unless there is one. Its workers then hold their shares of the GPUs.

        `make_room` is called when a later group waits long for its GPUs.
        """
        self._group = self._group or self._start()
        self._make_room = make_room

    def set_teacher(self, teacher: NetworkState) -> None:
        self._teacher = ray.put((teacher.plan, pack(teacher.tensors)))

    def run(
        self,
        network: NetworkState,
        optimizer_state: Mapping[str, torch.Tensor],
        training_phase: TrainingPhase,
        on_epoch: OnEpoch,
    ) -> PhaseResult:
        attempt = 0
        while True:
            try:
                return self._run(network, optimizer_state, training_phase, on_epoch)
            except _GroupLostError as lost:
                self._group = None
                attempt = 1 if self._last is not None else attempt + 1  # the count starts again after progress
                if attempt == GROUP_ATTEMPTS:
                    raise TrainingError(
                        f"training phase {training_phase.number} ({training_phase.phase}): the worker group was lost "
                        f"{attempt} times, last: {lost}"
                    ) from lost
                logger.warning("the worker group was lost (%s); starting another", lost)
            if self._last is not None:
                network = NetworkState(network.plan, self._last.tensors)
                optimizer_state, training_phase = (
                    self._last.optimizer_state,
                    replace(training_phase, done=self._last.position + 1),
                )

    def _run(
        self,
        network: NetworkState,
        optimizer_state: Mapping[str, torch.Tensor],
        training_phase: TrainingPhase,
        on_epoch: OnEpoch,
    ) -> PhaseResult:
        self._last: EpochResult | None = None
        group = self._group = self._group or self._start()
        self._commands += 1
        # The arrays are one reference, so they are sent once per node and not once per rank.
        reference = ray.put((pack(network.tensors), pack(optimizer_state)))
        payload = PhaseCommand(training_phase, network.plan, [reference], self._teacher)
        self._ask(group, group.mailbox.submit.remote(self._commands, payload))
        while True:
            kind, value = self._ask(group, group.mailbox.take.remote())
            if kind == "failed":
                self._abandon(group)
                raise value if isinstance(value, LaaspError) else TrainingError(str(value))
            if kind == "done":
                return value
            arrays, carried_arrays, done = value
            if done.position < (training_phase.done if self._last is None else self._last.position + 1):
                continue  # posted twice: by a worker that died, and by its successor
            done = replace(done, tensors=unpack(arrays, copy=True), optimizer_state=unpack(carried_arrays, copy=True))
            self._last = done
            on_epoch(done)

    def _ask(self, group: _Group, reference: Any, when_late: Callable[[], None] = lambda: None) -> Any:
        """The result of `reference`. Raises _GroupLostError if the group dies first, because no result would come."""
        late = time.monotonic() + PATIENCE_S
        while True:
            if time.monotonic() > late:
                when_late()
                late = math.inf
            ready, _ = ray.wait([reference], timeout=0.5)
            if ready:
                try:
                    return ray.get(reference)
                except ray.exceptions.RayActorError as error:
                    raise _GroupLostError(f"its mailbox died: {error}") from error
            if not group.thread.is_alive():
                raise _GroupLostError(str(group.failure[0]) if group.failure else "it ended by itself")

    def _start(self) -> _Group:
        os.environ.update({key: os.environ.get(key, value) for key, value in TRAIN_ENVIRONMENT.items()})
        config, share = self._config, self._share
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_concurrency": 10_000, "scheduling_strategy": here}
        mailbox = ray.remote(Mailbox).options(**options).remote(1 + config.cluster.worker_failures)
        trainer = ray.train.torch.TorchTrainer(
            train_worker,
            train_loop_config={"mailbox": mailbox, "unpruned": [self._unpruned], "config": config},
            scaling_config=ray.train.ScalingConfig(
                num_workers=share.workers, use_gpu=share.gpus > 0, resources_per_worker=share.trainer_resources
            ),
            run_config=ray.train.RunConfig(
                # Ray Train resumes by itself under a known name, but only our own store decides where to resume.
                name=f"{config.name}-{uuid.uuid4().hex[:8]}",
                storage_path=self._storage_path,
                failure_config=ray.train.FailureConfig(max_failures=GROUP_RESTARTS),
            ),
        )
        failure: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:  # the thread that waits for the group reports it
                failure.append(error)

        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        group = _Group(mailbox, thread, failure)
        self._ask(group, mailbox.met.remote(), self._say_waiting)
        return group

    def _say_waiting(self) -> None:
        self._make_room()
        logger.warning(
            "no trainer has come up for %d s; %d are wanted, each with %s, free in the cluster: %s",
            PATIENCE_S,
            self._share.workers,
            self._share.trainer_resources,
            ray.available_resources(),
        )

    def _abandon(self, group: _Group) -> None:
        """Abandons a group without waiting: a rank failed, so other ranks may hang in a collective."""
        ray.kill(group.mailbox)
        self._group = None

    def close(self) -> None:
        """Stops the workers. Workers that hang in a collective end with the Ray session."""
        if self._group is None:
            return
        try:
            ray.get(self._group.mailbox.stop.remote(), timeout=10)
        except ray.exceptions.RayError as error:
            logger.warning("the trainers' mailbox did not answer while closing: %s", error)
        self._group.thread.join(timeout=30)
        self._group = None


def put_network(unpruned: nn.Module) -> Any:
    """The object reference of the unpruned network, for trainers and executors alike."""
    return ray.put(unpruned)
