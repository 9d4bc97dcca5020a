"""The search on a cluster: candidates' losses are measured in Ray tasks, and each unit's losses return when it
is done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from torch import nn

from laasp_ray.config import RunConfig
from laasp_ray.data.calibration import CalibrationImages
from laasp_ray.data.loaders.registry import normalise
from laasp_ray.distributed import importance
from laasp_ray.distributed.cluster import ResourcePlan
from laasp_ray.distributed.process import PROCESS, device
from laasp_ray.distributed.tasks import TASK_RETRIES, answer
from laasp_ray.distributed.transfer import pack, unpack
from laasp_ray.errors import MemoryShortError, UnmaskedError
from laasp_ray.pruning.network import NetworkState, rebuild
from laasp_ray.pruning.plan import Plan
from laasp_ray.records import MeasuredLoss
from laasp_ray.search.activations import ImportanceRequest, chunks_of
from laasp_ray.search.batchnorm import reestimate, with_statistics
from laasp_ray.search.engine import BranchPoints, Cost, Losses
from laasp_ray.search.evaluate import LossTask
from laasp_ray.search.executor import settings_of
from laasp_ray.search.memory import REMEDY, retried
from laasp_ray.search.schedule import OnResult, OnShare, Unit, measure

logger = logging.getLogger(__name__)

SEE_ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
PATIENCE_S = 60


class RayExecutor:
    """The Executor (search/executor.py) on Ray tasks. It gives the serial executor's losses, because batches are cut
    the same way.

    The network of an iteration is put into the object store once, with the iteration's candidates; a task gets only
    their positions. Every worker process rebuilds the network once per iteration, and keeps the calibration set between
    iterations.
    """

    def __init__(
        self, network: Any, unpruned: nn.Module, calibration: CalibrationImages, config: RunConfig, share: ResourcePlan
    ) -> None:
        """`network` is the object reference of `unpruned`."""
        self._network, self._unpruned, self._search, self._share = network, unpruned, config.search, share
        self._images, self._seed = len(calibration.labels), config.seed
        self._example = normalise(calibration.images[:1], config.data)
        self._calibration = ray.put(
            (calibration.images.numpy(), calibration.labels.numpy(), config.data, config.search)
        )
        self._options = {
            "max_retries": TASK_RETRIES,
            "retry_exceptions": [MemoryShortError],  # another device may have more memory, or this one later
            "scheduling_strategy": "SPREAD",
            # A process cannot change its first CUDA_VISIBLE_DEVICES later, so it sees all GPUs and is assigned one of
            # them.
            "runtime_env": {"env_vars": SEE_ALL_GPUS} if share.gpus else None,
            **share.task_options,
        }
        self._task = ray.remote(measure_losses).options(**self._options)

    def for_scoring(self, network: NetworkState) -> NetworkState:
        if not self._search.reestimate_batchnorm:
            return network
        iteration = ray.put((network.plan, pack(network.tensors)))
        task = ray.remote(statistics_task).options(**self._options)
        arrays = answer(
            task.remote([self._network, iteration, self._calibration]),
            "the measurement of BatchNorm statistics",
            "leave out search.reestimate_batchnorm",
        )
        return with_statistics(network, unpack(arrays, copy=True))

    def measure(
        self, network: NetworkState, tasks: Sequence[LossTask], on_result: OnResult, on_share: OnShare
    ) -> list[MeasuredLoss]:
        branch_points = BranchPoints(rebuild(self._unpruned, network).eval(), self._example)
        costs = [branch_points.cost(task) for task in tasks]
        # A masked candidate needs no plan, which is much larger than a mask.
        pairs = zip(tasks, costs, strict=True)
        light = [task if cost.copied else replace(task, step=Plan.empty()) for task, cost in pairs]
        arrays = pack(network.tensors)

        def inputs_with(some: Sequence[LossTask]) -> list[Any]:
            return [self._network, ray.put((network.plan, arrays, some, branch_points.untraced)), self._calibration]

        backend = TaskBackend(self._task, inputs_with(light), lambda: inputs_with(tasks), costs, self._share)
        try:
            return measure(
                backend, len(tasks), settings_of(self._search, self._images, self._seed), on_result, on_share
            )
        finally:
            backend.cancel()

    def importance(self, network: NetworkState, wanted: ImportanceRequest) -> Mapping[str, torch.Tensor]:
        iteration = ray.put((network.plan, pack(network.tensors)))
        chunks = chunks_of(self._images, self._search.batch_size)
        slots = slots_of(ray.cluster_resources(), self._share)
        return importance.spread([self._network, iteration, self._calibration], wanted, chunks, slots, self._options)

    def close(self) -> None:
        return None


class TaskBackend:
    """Units as Ray tasks (search/schedule.py says what a backend is)."""

    def __init__(
        self,
        task: Any,
        inputs: list[Any],
        inputs_with_plans: Callable[[], list[Any]],
        costs: Sequence[Cost],
        share: ResourcePlan,
    ) -> None:
        """Ray does not fetch references inside the list `inputs` for every task; the processes keep the fetched values.

        `inputs_with_plans` returns inputs with the plans of all prunes, for a worker that cannot mask.
        """
        self._task, self._inputs, self._costs, self._share = task, inputs, costs, share
        self._inputs_with_plans, self._with_plans = inputs_with_plans, False
        self._pending: dict[Any, tuple[Unit, bool]] = {}
        self._heard = False
        self.slots = slots_of(ray.cluster_resources(), share)

    def cost(self, task: int) -> Cost:
        return self._costs[task]

    def submit(self, unit: Unit) -> None:
        self._pending[self._task.remote(self._inputs, unit.tasks, unit.images)] = unit, self._with_plans

    def collect(self) -> tuple[Unit, Losses]:
        while True:
            done, _ = ray.wait(list(self._pending), num_returns=1, timeout=PATIENCE_S)
            if done:
                self._heard = True
                unit, with_plans = self._pending.pop(done[0])
                try:
                    return unit, answer(done[0], "an evaluation task", REMEDY)
                except UnmaskedError as error:
                    if with_plans:
                        raise
                    self._send_plans(error)
                    self.submit(unit)
            elif not self._heard:
                self._say_waiting()

    def _send_plans(self, error: UnmaskedError) -> None:
        """Sends plans with later tasks, because a worker could not mask a candidate that the driver can mask."""
        if not self._with_plans:
            logger.warning("a worker cannot mask what the driver can, and is sent plans to cut by: %s", error)
            self._inputs, self._with_plans = self._inputs_with_plans(), True

    def cancel(self) -> None:
        for reference in self._pending:
            ray.cancel(reference, force=False)

    def _say_waiting(self) -> None:
        logger.warning(
            "no candidate was measured for %d s; a task wants %s, free in the cluster: %s",
            PATIENCE_S,
            self._share.task_options,
            ray.available_resources(),
        )


def slots_of(resources: Mapping[str, float], share: ResourcePlan) -> int:
    """The number of evaluation tasks that can run at the same time on a cluster with these resources."""
    if share.gpus:
        return max(1, int(resources.get("GPU", 0)))
    return max(1, int(resources.get("CPU", 0)))


def measure_losses(inputs: list[Any], positions: Sequence[int], images: np.ndarray) -> Losses:
    """The Ray task: measures some of the iteration's tasks on some images of the calibration set."""
    engine, tasks = retried(lambda: PROCESS.load(*inputs), "the network of an evaluation task")
    losses = engine.losses([tasks[position] for position in positions], images)
    if device().type == "cuda":
        torch.cuda.empty_cache()  # the trainers share this GPU, and this process lives on after the search
    return losses


def statistics_task(inputs: list[Any]) -> dict[str, np.ndarray]:
    """The Ray task that measures the iteration's BatchNorm statistics. The process keeps the values of references in
    `inputs`.
    """
    model, calibration = PROCESS.network(*inputs)
    arrays = pack(reestimate(model, calibration))
    if device().type == "cuda":
        torch.cuda.empty_cache()  # the trainers share this GPU
    return arrays
