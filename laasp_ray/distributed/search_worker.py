"""The search's home on a device: an actor that keeps what the search needs from call to call."""

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
    """Where a worker is: its Ray node, the node's address, its process, the GPUs that Ray gave it, its device there."""

    node_id: str
    address: str
    pid: int
    gpus: tuple[str, ...]
    device: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.address} ({self.device})"


class SearchWorker:
    """Carries out calls, one after the other, on the device that Ray gave it.

    The functions are those of executor.py and importance.py. They find the unpruned network, the calibration set and
    the iteration's network in `process.PROCESS`, where a call before left them.
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
        """References inside a list among the arguments are not fetched by Ray: the function keeps what they name."""
        return function(*arguments)

    def rest(self) -> None:
        """Gives up the iteration's network and the memory that torch holds: the trainers share this device."""
        PROCESS.forget_iteration()
        if device().type == "cuda":
            torch.cuda.empty_cache()


def kill_process(pid: int) -> None:
    """The task that ends a worker which answers nobody, on that worker's node."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
