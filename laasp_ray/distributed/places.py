"""Where a process of the run works, and how to end it there."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """The place of a process: Ray node, address, process, the GPUs that Ray assigned, and torch's device."""

    node_id: str
    address: str
    pid: int
    gpus: tuple[str, ...]
    device: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.address} ({self.device})"


def this_place(device: str) -> Place:
    """The place of this process, which works on `device`."""
    return Place(
        node_id=ray.get_runtime_context().get_node_id(),
        address=ray.util.get_node_ip_address(),
        pid=os.getpid(),
        gpus=tuple(map(str, ray.get_gpu_ids())),
        device=device,
    )


def near(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Places a process on the node, or on another one if that is gone or has no room."""
    return NodeAffinitySchedulingStrategy(node_id, soft=True, _spill_on_unavailable=True)


def kill_at(place: Place) -> None:
    """Kills a process that does not answer, without waiting for it. `ray.kill` does not end one that is stopped or
    hangs in native code.
    """
    there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    ray.remote(_kill_process).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(place.pid)


def _kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
