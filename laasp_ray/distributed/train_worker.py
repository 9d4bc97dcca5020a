"""The loop of a Ray Train worker: it waits for a training phase, trains it, posts the results, and repeats until
stopped.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn

from laasp_ray.config import RunConfig
from laasp_ray.distributed.cluster import usable_cpus
from laasp_ray.distributed.deadlines import BEAT_S
from laasp_ray.distributed.mailbox import Command
from laasp_ray.distributed.places import this_place
from laasp_ray.distributed.transfer import pack, unpack
from laasp_ray.distributed.versions import check_versions
from laasp_ray.errors import DataError, LaaspError
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.plan import Plan
from laasp_ray.tasks import Task
from laasp_ray.train.data import PhaseData
from laasp_ray.train.ddp import distributed
from laasp_ray.train.loop import EpochResult, PhaseResult, TrainingPhase, run_training_phase
from laasp_ray.train.trainer import rebuild_on


@dataclass(frozen=True)
class PhaseCommand:
    """A training phase for the workers. `arrays` holds one object reference: (state dict, optimizer state) as numpy
    arrays.

    `teacher` is the reference of the (plan, state dict) of the network to imitate, or None.
    """

    training_phase: TrainingPhase
    plan: Plan
    arrays: list[Any]
    teacher: Any


def train_worker(settings: dict[str, Any]) -> None:
    """The loop of one rank.

    `settings` are its mailbox, the unpruned network's reference, the run's config and task, the parts of a global
    batch, the number of threads (None: its share of the CPUs here), and the driver's versions and digests of images.
    """
    context = ray.train.get_context()
    rank = context.get_world_rank()
    mailbox, config = settings["mailbox"], settings["config"]
    torch.set_num_threads(settings["threads"] or max(1, usable_cpus() // context.get_local_world_size()))
    unpruned = ray.get(settings["unpruned"][0])
    data: PhaseData | None = None
    teacher: NetworkState | None = None
    heart = _Heart(mailbox, rank)
    finished = -1
    while (command := _next(mailbox, finished)) is not None:
        heart.begin(command.number)
        try:
            check_versions(settings["versions"])
            if data is None:
                with _naming_the_node():
                    data = _open_data(config, settings["parts"], command.payload.training_phase, settings["task"])
                _check_same_data(data, settings["images"])
            teacher = teacher or _teacher(command.payload)
            for kind, value in _carry_out(command, unpruned, teacher, config, data, heart):
                if rank == 0:
                    ray.get(mailbox.post.remote(command.number, kind, value))
        except ray.exceptions.RayActorError:
            return  # the mailbox is gone (see _next)
        except LaaspError as error:
            # Another group would fail the same way, so the driver gets the error.
            ray.get(mailbox.post.remote(command.number, "failed", error))
        except Exception as error:
            # A lost peer looks like this too, so the driver starts another group. It gives up if that does not help.
            last = traceback.format_exc(limit=-3)
            text = f"rank {rank}: {type(error).__name__}: {error}\n{last}"
            ray.get(mailbox.post.remote(command.number, "complaint", text))
            raise
        finished = command.number
        heart.rest()
        del command  # this also frees its arrays in the object store
    if data is not None:
        data.close()


class _Heart:
    """Posts this rank's heartbeats (see Beat) from a thread of its own, for as long as the process lives."""

    def __init__(self, mailbox: Any, rank: int) -> None:
        self._mailbox, self._rank = mailbox, rank
        self._place = this_place(str(ray.train.torch.get_device()))
        self._command: int | None = None
        self._work = 0
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def begin(self, command: int) -> None:
        self._command, self._work = command, 0

    def rest(self) -> None:
        """No command is open: nothing has to advance."""
        self._command = None

    def beat(self) -> None:
        """A piece of work is done."""
        self._work += 1

    def _run(self) -> None:
        while True:
            self._mailbox.beat.remote(self._rank, self._place, self._command, self._work)
            time.sleep(BEAT_S)


def _next(mailbox: Any, finished: int) -> Command | None:
    try:
        return ray.get(mailbox.next.remote(finished))
    except ray.exceptions.RayActorError:
        return None  # without its mailbox the group has no driver; the driver starts another group


def _teacher(payload: PhaseCommand) -> NetworkState | None:
    """The teacher's network, as a view of the object store. It is kept, so that it is sent to this node only once."""
    if payload.teacher is None:
        return None
    plan, arrays = ray.get(payload.teacher)
    return NetworkState(plan, unpack(arrays, copy=False))


@contextmanager
def _naming_the_node() -> Iterator[None]:
    """Adds this node's address to an error in the data: other nodes may have the images."""
    try:
        yield
    except LaaspError as error:
        raise type(error)(f"on node {ray.util.get_node_ip_address()}: {error}") from error


def _open_data(config: RunConfig, parts: int, training_phase: TrainingPhase, task: Task) -> PhaseData:
    return PhaseData(
        config.data,
        batch_size=config.train.global_batch(parts),
        seed=config.seed,
        device=ray.train.torch.get_device(),
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        parts=parts,
        excluded=training_phase.excluded,
        places=training_phase.places,
        task=task,
    )


def _check_same_data(data: PhaseData, expected: tuple[str, str]) -> None:
    """Raises DataError, in all ranks, unless every rank reads the driver's images, whose digests are `expected`.

    A node with another copy of them would train on others, and a rank that is alone has no other to compare with.
    """
    here = f"{ray.util.get_node_ip_address()} ({data.train_images:,} training and {data.test_images:,} test images)"
    everyone: list[Any] = [None] * data.world
    dist.all_gather_object(everyone, (here, data.digest()))
    for other, digest in everyone:
        if digest != expected:
            raise DataError(
                f"the nodes have different images: those on {other} and the driver's differ in names, labels or order; "
                "data.path must hold the same images on every node"
                if data.task.data is None
                else f"the data factory gives other examples on {other} than in the driver: it must give the same, in "
                "the same order, in every process"
            )


def _carry_out(
    command: Command,
    unpruned: nn.Module,
    teacher: NetworkState | None,
    config: RunConfig,
    data: PhaseData,
    heart: _Heart,
) -> Iterator[tuple[str, Any]]:
    """Yields the results that rank 0 posts. Weights are numpy arrays, which the object store does not copy.

    The end is posted after the networks are freed, because the search, which starts then, shares this GPU.
    """
    payload: PhaseCommand = command.payload
    training_phase = payload.training_phase
    arrays, optimizer_state = ray.get(payload.arrays[0])
    ended: PhaseResult | None = None
    shape = config.model.input_shape
    for event in run_training_phase(
        rebuild_on(data.device, unpruned, NetworkState(payload.plan, unpack(arrays, copy=False)), shape),
        unpack(optimizer_state, copy=False),
        training_phase,
        data=data,
        config=config.train,
        seed=config.seed,
        teacher=rebuild_on(data.device, unpruned, teacher, shape) if teacher is not None else None,
        wrap=lambda model: distributed(model, shape, config.train, data.task),
        heartbeat=heart.beat,
    ):
        event = replace(event, unreadable=_gather(event.unreadable))
        if isinstance(event, PhaseResult):
            ended = replace(event, loader=", ".join(_gather((event.loader,))))
        else:
            yield "epoch", _packed(event)
    if data.device.type == "cuda":
        torch.cuda.empty_cache()
    yield "done", ended


def _packed(event: EpochResult) -> tuple[dict[str, Any], dict[str, Any], EpochResult]:
    return pack(event.tensors), pack(event.optimizer_state), replace(event, tensors={}, optimizer_state={})


def _gather(names: tuple[str, ...]) -> tuple[str, ...]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, names)
    return tuple(sorted({name for part in everyone for name in part}))
