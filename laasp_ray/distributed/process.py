"""The objects that a worker process of the search keeps between tasks, and its device."""

from __future__ import annotations

import os
from typing import Any

import ray
import torch
from torch import nn

from laasp_ray.config import DataConfig, SearchConfig
from laasp_ray.distributed.cluster import usable_cpus
from laasp_ray.distributed.transfer import unpack, unpack_object
from laasp_ray.errors import ConfigError
from laasp_ray.models.device import unusable
from laasp_ray.pruning.network import NetworkState, rebuild
from laasp_ray.pruning.plan import Plan
from laasp_ray.search.calibration import calibration_set
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import Calibration, LossTask, ready_with
from laasp_ray.tasks import Task


class Process:
    """Keeps objects from one task to the next: the unpruned network, the iteration's network, the calibration set."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, Any]] = {}

    def load(self, unpruned: Any, network: Any, calibration: Any, work: Any) -> tuple[Engine, list[LossTask]]:
        """What measures losses on the iteration's network, and the candidates in `work`."""
        model, images = self.network(unpruned, network, calibration)
        _, search = self._images(calibration)
        return self._once("work", work, lambda: _engine(model, images, search, *ray.get(work)))

    def network(self, unpruned: Any, network: Any, calibration: Any) -> tuple[nn.Module, Calibration]:
        """The iteration's network, ready to run, and the images."""
        torch.set_num_threads(threads())
        base = self._once("unpruned", unpruned, lambda: ray.get(unpruned))
        images, _ = self._images(calibration)
        return self._once("network", network, lambda: _network(base, images, *ray.get(network)))

    def _images(self, calibration: Any) -> tuple[Calibration, SearchConfig]:
        return self._once("calibration", calibration, lambda: _calibration(*ray.get(calibration)))

    def forget_iteration(self) -> None:
        """Lets go of the iteration's network and candidates; the unpruned network and the images stay."""
        for name in ("work", "network"):
            self._kept.pop(name, None)

    def _once(self, name: str, reference: Any, make: Any) -> Any:
        key = f"{reference.hex()} on {device()}"  # a process may get another GPU for the next task
        known = self._kept.get(name)
        if known is None or known[0] != key:
            del known
            self._kept.pop(name, None)  # frees the old object before the new one is made
            self._kept[name] = (key, make())
        return self._kept[name][1]


PROCESS = Process()


def device() -> torch.device:
    """The GPU that Ray assigned to this task, among all that the process sees (see SEE_ALL_GPUS).

    Raises ConfigError if torch cannot use it.
    """
    given = ray.get_gpu_ids()
    if not given:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"node {ray.util.get_node_ip_address()}: {unusable()}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return torch.device("cuda", visible.split(",").index(str(given[0])) if visible else int(given[0]))


def enter_device() -> torch.device:
    """Makes this thread's device that of the task. Some of torch's functions work on a process's first GPU otherwise,
    and take memory for a context there, which is another worker's.
    """
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    return here


def threads() -> int:
    """The number of threads. A CPU task uses one on every machine: tasks fill the cores, and the order of sums is
    fixed.
    """
    return 1 if device().type == "cpu" else max(1, usable_cpus() // 4)


def _engine(
    model: nn.Module, calibration: Calibration, search: SearchConfig, tasks: list[LossTask], untraced: str
) -> tuple[Engine, list[LossTask]]:
    """`untraced` is the driver's verdict on the network (search/tracing.py). The worker must mask what the driver
    masks.
    """
    engine = Engine(model, calibration, memory_bytes=search.memory_bytes, untraced=untraced, precision=search.precision)
    return engine, tasks


def _network(
    unpruned: nn.Module, calibration: Calibration, plan: Plan, arrays: dict[str, Any]
) -> tuple[nn.Module, Calibration]:
    return ready_with(rebuild(unpruned, NetworkState(plan, unpack(arrays, copy=False))), calibration)


def _calibration(drawn: Any, task: Task, data: DataConfig, search: SearchConfig) -> tuple[Calibration, SearchConfig]:
    return calibration_set(unpack_object(drawn), data, search, task).to(device()), search
