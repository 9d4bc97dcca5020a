"""The loop of a Ray Train worker: it waits for a training phase, trains it, posts the results, and repeats until
stopped.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
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
from laasp_ray.distributed.mailbox import Command
from laasp_ray.distributed.transfer import pack, unpack
from laasp_ray.errors import LaaspError
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.plan import Plan
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
    """The loop of one rank. `settings` are its mailbox, the unpruned network's reference and the run's config."""
    context = ray.train.get_context()
    rank = context.get_world_rank()
    mailbox, config = settings["mailbox"], settings["config"]
    torch.set_num_threads(max(1, usable_cpus() // context.get_local_world_size()))
    unpruned = ray.get(settings["unpruned"][0])
    data: PhaseData | None = None
    teacher: NetworkState | None = None
    finished = -1
    while (command := _next(mailbox, finished)) is not None:
        _check_agreement(command)
        try:
            data = data or _open_data(config, command.payload.training_phase)
            teacher = teacher or _teacher(command.payload)
            for kind, value in _carry_out(command, unpruned, teacher, config, data):
                if rank == 0:
                    ray.get(mailbox.post.remote(command.number, kind, value))
        except ray.exceptions.RayActorError:
            return  # the mailbox is gone (see _next)
        except LaaspError as error:
            # A restart would fail the same way, so the driver gets the error and the group lives on.
            ray.get(mailbox.post.remote(command.number, "failed", error))
        except Exception as error:
            # A lost peer looks like this too, so the group restarts. The mailbox gives up if that does not help.
            last = traceback.format_exc(limit=-3)
            ray.get(mailbox.complain.remote(command.number, f"rank {rank}: {type(error).__name__}: {error}\n{last}"))
            raise
        finished = command.number
        del command  # this also frees its arrays in the object store
    if data is not None:
        data.close()


def _next(mailbox: Any, finished: int) -> Command | None:
    try:
        return ray.get(mailbox.next.remote(finished, ray.train.get_context().get_world_rank()))
    except ray.exceptions.RayActorError:
        return None  # without its mailbox the group has no driver; the driver starts another group


def _check_agreement(command: Command) -> None:
    """Raises RuntimeError unless all ranks of a restarted group got the same command at the same epoch."""
    done = command.resume[-1].position if command.resume is not None else -1
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, (command.number, done))
    if len(set(theirs)) != 1:
        raise RuntimeError(f"the ranks were given different commands: {theirs}")


def _teacher(payload: PhaseCommand) -> NetworkState | None:
    """The teacher's network, as a view of the object store. It is kept, so that it is sent to this node only once."""
    if payload.teacher is None:
        return None
    plan, arrays = ray.get(payload.teacher)
    return NetworkState(plan, unpack(arrays, copy=False))


def _open_data(config: RunConfig, training_phase: TrainingPhase) -> PhaseData:
    return PhaseData(
        config.data,
        batch_size=config.train.batch_size,
        seed=config.seed,
        device=ray.train.torch.get_device(),
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        excluded=training_phase.excluded,
        places=training_phase.places,
    )


def _carry_out(
    command: Command, unpruned: nn.Module, teacher: NetworkState | None, config: RunConfig, data: PhaseData
) -> Iterator[tuple[str, Any]]:
    """Yields the results that rank 0 posts. Weights are numpy arrays, which the object store does not copy.

    The end is posted after the networks are freed, because the search, which starts then, shares this GPU.
    """
    payload: PhaseCommand = command.payload
    training_phase = payload.training_phase
    if command.resume is None:
        arrays, optimizer_state = ray.get(payload.arrays[0])
    else:
        arrays, optimizer_state, done = command.resume
        training_phase = replace(training_phase, done=done.position + 1)
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
        wrap=lambda model: distributed(model, shape, config.train),
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
