"""The search worker: an actor on one device that keeps the network and the images between calls."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from laasp_ray.distributed.process import PROCESS, device


@dataclass(frozen=True)
class Place:
    """The place of a worker: Ray node, address, process, the GPUs that Ray assigned, and torch's device."""

    node_id: str
    address: str
    pid: int
    gpus: tuple[str, ...]
    device: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.address} ({self.device})"


class SearchWorker:
    """Carries out calls, one after the other, on the device that Ray assigned to it.

    The functions of executor.py and importance.py keep the unpruned network, the calibration set and the iteration's
    network in `process.PROCESS` between calls.
    """

    def place(self) -> Place:
        return Place(
            node_id=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            gpus=tuple(map(str, ray.get_gpu_ids())),
            device=str(device()),
        )

    def run(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Calls the function. Ray does not fetch references inside a list argument; the function does, once."""
        return function(*arguments)

    def rest(self) -> None:
        """Frees the iteration's network and torch's cached memory, because the trainers share this device."""
        PROCESS.forget_iteration()
        if device().type == "cuda":
            torch.cuda.empty_cache()


def kill_process(pid: int) -> None:
    """Kills a worker that does not answer. It runs as a task on that worker's node."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
