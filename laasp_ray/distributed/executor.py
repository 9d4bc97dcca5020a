"""The search on a cluster: candidates' losses as Ray tasks, one worker process each, streamed back as they come."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import ray
import torch
from torch import nn

from laasp_ray.config import DataConfig, SearchConfig
from laasp_ray.data.loader import normalise
from laasp_ray.data.subset import Subset
from laasp_ray.distributed.cluster import Share, usable_cpus
from laasp_ray.distributed.transfer import pack, unpack
from laasp_ray.errors import SearchError
from laasp_ray.pruning.network import NetworkState, rebuild
from laasp_ray.pruning.plan import Plan
from laasp_ray.search.evaluate import LossSubset, LossTask, MeasuredLoss, measure_all, ready
from laasp_ray.search.executor import OnResult

logger = logging.getLogger(__name__)

TASK_RETRIES = 5
"""How often a task whose worker or node was lost is run again."""

SEE_ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
PATIENCE_S = 60


class RayExecutor:
    """The Executor (search/executor.py) on Ray tasks. Gives the serial executor's losses: batches are cut the same way.

    The network of a turn is put into the object store once; tasks carry indices, and every worker process rebuilds it
    once per turn. The subset stays with the worker processes between turns.
    """

    def __init__(self, unpruned: Any, subset: Subset, data: DataConfig, search: SearchConfig, share: Share) -> None:
        """`unpruned` is the object reference of the unpruned network."""
        self._unpruned, self._search, self._share = unpruned, search, share
        self._subset = ray.put((subset.images.numpy(), subset.labels.numpy(), data, search.batch_size))
        self._task = ray.remote(measure_losses).options(
            max_retries=TASK_RETRIES,
            scheduling_strategy="SPREAD",
            # A process that lives on cannot change its first CUDA_VISIBLE_DEVICES: it must see all GPUs, and be told.
            runtime_env={"env_vars": SEE_ALL_GPUS} if share.gpus else None,
            **share.task_options,
        )

    def measure(self, network: NetworkState, tasks: Sequence[LossTask], on_result: OnResult) -> list[MeasuredLoss]:
        turn = ray.put((network.plan, pack(network.tensors)))
        size = self._search.candidates_per_task
        starts = {}
        for start in range(0, len(tasks), size):
            # References inside a list are not fetched by Ray for every task anew; the worker process keeps them.
            inputs = [self._unpruned, turn, self._subset]
            starts[self._task.remote(inputs, list(tasks[start : start + size]))] = start
        results: list[MeasuredLoss | None] = [None] * len(tasks)
        pending = list(starts)
        try:
            while pending:
                ready, pending = ray.wait(pending, num_returns=1, timeout=PATIENCE_S)
                if not ready:
                    if len(pending) == len(starts):
                        self._say_waiting()
                    continue
                for position, result in enumerate(self._get(ready[0]), starts[ready[0]]):
                    results[position] = result
                    on_result(position, result)
        finally:
            for reference in pending:
                ray.cancel(reference, force=False)
        return [result for result in results if result is not None]

    def _say_waiting(self) -> None:
        logger.warning(
            "no candidate was measured for %d s; a task wants %s, free in the cluster: %s",
            PATIENCE_S,
            self._share.task_options,
            ray.available_resources(),
        )

    def _get(self, reference: Any) -> list[MeasuredLoss]:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from error
        except ray.exceptions.RayError as error:
            raise SearchError(
                f"an evaluation task was lost {TASK_RETRIES + 1} times: {error}; "
                "its worker may have run out of memory: lower search.batch_size or search.images"
            ) from error

    def close(self) -> None:
        return None


def measure_losses(inputs: list[Any], tasks: list[LossTask]) -> list[MeasuredLoss]:
    """The task itself: the losses of some prunes of the turn's network."""
    model, subset = _PROCESS.load(*inputs)
    results = measure_all(model, tasks, subset)
    if subset.labels.is_cuda:
        torch.cuda.empty_cache()  # the trainers share this GPU, and this process outlives the search
    return results


class _Process:
    """What a worker process keeps from one task to the next: the unpruned network, the turn's network, the subset."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, Any]] = {}

    def load(self, unpruned: Any, turn: Any, subset: Any) -> tuple[nn.Module, LossSubset]:
        torch.set_num_threads(_threads())
        base = self._once("unpruned", unpruned, lambda: ray.get(unpruned))
        model = self._once("turn", turn, lambda: _turn_network(base, *ray.get(turn)))
        return model, self._once("subset", subset, lambda: _subset(*ray.get(subset)))

    def _once(self, name: str, reference: Any, make: Any) -> Any:
        key = f"{reference.hex()} on {_device()}"  # a process may be given another GPU from task to task
        known = self._kept.get(name)
        if known is None or known[0] != key:
            del known
            self._kept.pop(name, None)  # let go of the last one before the next is made
            self._kept[name] = (key, make())
        return self._kept[name][1]


_PROCESS = _Process()


def _device() -> torch.device:
    """The GPU that Ray gave this task, among all that the process sees (see SEE_ALL_GPUS)."""
    given = ray.get_gpu_ids()
    if not given or not torch.cuda.is_available():
        return torch.device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return torch.device("cuda", visible.split(",").index(str(given[0])) if visible else int(given[0]))


def _threads() -> int:
    """One thread on a CPU task, whatever the machine: the tasks fill the cores, and the sums stay in one order."""
    return 1 if _device().type == "cpu" else max(1, usable_cpus() // 4)


def _turn_network(unpruned: nn.Module, plan: Plan, arrays: dict[str, Any]) -> nn.Module:
    return ready(rebuild(unpruned, NetworkState(plan, unpack(arrays, copy=False))), _device())


def _subset(images: Any, labels: Any, data: DataConfig, batch_size: int) -> LossSubset:
    tensors = unpack({"images": images, "labels": labels}, copy=False)
    subset = LossSubset(tensors["images"], tensors["labels"], batch_size, lambda batch: normalise(batch, data))
    return subset.to(_device())
