"""The search on a cluster: units of candidates' losses as calls of the workers, streamed back as they come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from torch import nn

from laasp_ray.config import RunConfig
from laasp_ray.distributed import importance
from laasp_ray.distributed.cluster import ResourcePlan
from laasp_ray.distributed.grams import spread_grams
from laasp_ray.distributed.process import PROCESS
from laasp_ray.distributed.search_workers import Job, SearchWorkers
from laasp_ray.distributed.transfer import pack, pack_object, unpack
from laasp_ray.errors import UnmaskedError
from laasp_ray.pruning.network import NetworkState, rebuild
from laasp_ray.pruning.plan import Plan
from laasp_ray.pruning.readers import Reader
from laasp_ray.records import MeasuredLoss
from laasp_ray.search.activations import ImportanceRequest, chunks_of
from laasp_ray.search.batchnorm import ENOUGH, reestimate, with_statistics
from laasp_ray.search.calibration import Drawn, calibration_set
from laasp_ray.search.engine import Cost, Losses, untraced_by
from laasp_ray.search.evaluate import LossTask
from laasp_ray.search.executor import settings_of
from laasp_ray.search.grams import Grams, gram_chunks, parts
from laasp_ray.search.memory import REMEDY, retried
from laasp_ray.search.race_memory import RaceMemory
from laasp_ray.search.remembering import BranchPointMemory
from laasp_ray.search.schedule import OnResult, OnShare, Unit, measure
from laasp_ray.tasks import CLASSIFICATION, Task

logger = logging.getLogger(__name__)


class RayExecutor:
    """The Executor (search/executor.py) on one worker a device. Gives the serial executor's losses: batches are cut
    the same way.

    The network of an iteration is put into the object store once, so that a node has one copy of its weights. Every
    worker rebuilds it once, and keeps the calibration set between iterations. Calls carry candidates' positions.
    """

    def __init__(
        self,
        network: Any,
        unpruned: nn.Module,
        calibration: Drawn,
        config: RunConfig,
        share: ResourcePlan,
        on_fault: Callable[[str], None] = lambda text: None,
        trainers: Callable[[], Sequence[str]] = lambda: (),
        task: Task = CLASSIFICATION,
    ) -> None:
        """`network` is the object reference of `unpruned`. `on_fault` is called for each worker that was lost.
        `trainers` gives the Ray node of each trainer that shares its GPU with the search.
        """
        self._network, self._unpruned, self._search = network, unpruned, config.search
        self._images, self._seed = len(calibration.indices), config.seed
        example = calibration_set(calibration, config.data, config.search, task).with_format(torch.contiguous_format)
        self._branch_points = BranchPointMemory(example.at(np.arange(1))[0], untraced_by(task) or None)
        self._calibration = ray.put((pack_object(calibration), task, config.data, config.search))
        self._workers = SearchWorkers(share, on_fault=on_fault, trainers=trainers)
        self._sent: tuple[NetworkState, Any] | None = None

    def for_scoring(self, network: NetworkState) -> NetworkState:
        if not self._search.reestimate_batchnorm:
            return network
        remedy = "leave out search.reestimate_batchnorm"
        inputs = self._inputs(network)
        arrays = self._workers.call(Job(statistics_task, [inputs], "the measurement of BatchNorm statistics", remedy))
        return with_statistics(network, unpack(arrays, copy=True))

    def measure(
        self,
        network: NetworkState,
        tasks: Sequence[LossTask],
        on_result: OnResult,
        on_share: OnShare,
        images: int | None = None,
        memory: RaceMemory | None = None,
    ) -> list[MeasuredLoss]:
        branch_points = self._branch_points.of(network, rebuild(self._unpruned, network).eval())
        costs = [branch_points.cost(task) for task in tasks]
        # A masked candidate needs no plan, which is much larger than a mask.
        pairs = zip(tasks, costs, strict=True)
        light = [task if cost.copied else replace(task, step=Plan.empty()) for task, cost in pairs]

        def inputs_with(some: Sequence[LossTask]) -> list[Any]:
            return [*self._inputs(network), ray.put((some, branch_points.untraced))]

        backend = WorkersBackend(self._workers, inputs_with(light), lambda: inputs_with(tasks), costs)
        settings = settings_of(self._search, min(images or self._images, self._images), self._seed)
        try:
            return measure(backend, len(tasks), settings, on_result, on_share, memory)
        finally:
            self._workers.drop()
            self._workers.rest()

    def importance(self, network: NetworkState, wanted: ImportanceRequest) -> Mapping[str, torch.Tensor]:
        chunks = chunks_of(self._images, self._search.batch_size)
        return importance.spread(self._workers, self._inputs(network), wanted, chunks)

    def grams(self, network: NetworkState, readers: Sequence[Reader]) -> Grams:
        chunks = gram_chunks(self._images, self._search.batch_size)
        some = parts(readers, self._search.memory_bytes)
        return spread_grams(self._workers, self._inputs(network), some, chunks)

    def statistics(self, network: NetworkState, behind: Collection[str]) -> Mapping[str, torch.Tensor]:
        remedy = "leave out prune.reestimate_batchnorm"
        arguments = [self._inputs(network), tuple(behind), ENOUGH]
        try:
            job = Job(statistics_task, arguments, "the measurement of BatchNorm statistics", remedy)
            return unpack(self._workers.call(job), copy=True)
        finally:
            self._workers.rest()  # training comes next, on the same devices

    def _inputs(self, network: NetworkState) -> list[Any]:
        """References to the unpruned network, to this one and to the calibration set."""
        if self._sent is None or self._sent[0] is not network:
            self._sent = None  # frees the network before
            self._sent = network, ray.put((network.plan, pack(network.tensors)))
        return [self._network, self._sent[1], self._calibration]

    def make_room(self) -> None:
        """Frees the GPUs that the search has to itself, for trainers that wait for one, and the last network."""
        self._sent = None
        self._workers.make_room()

    def close(self) -> None:
        self._workers.close()


class WorkersBackend:
    """Units as calls of the search's workers (search/schedule.py says what a backend is)."""

    def __init__(
        self,
        workers: SearchWorkers,
        inputs: list[Any],
        inputs_with_plans: Callable[[], list[Any]],
        costs: Sequence[Cost],
    ) -> None:
        """References inside the list `inputs` are not fetched by Ray for every call anew; the workers keep them.

        `inputs_with_plans` returns inputs with the plans of all prunes, for a worker that cannot mask.
        """
        self._workers, self._inputs, self._costs = workers, inputs, costs
        self._inputs_with_plans, self._with_plans = inputs_with_plans, False
        self._units: dict[Job, tuple[Unit, bool]] = {}
        self.slots = workers.slots

    def cost(self, task: int) -> Cost:
        return self._costs[task]

    def submit(self, unit: Unit) -> None:
        shared = max(self._costs[task].shared for task in unit.tasks)
        cost = len(unit.images) * (shared + sum(self._costs[task].own for task in unit.tasks))
        arguments = (self._inputs, unit.tasks, unit.images, unit.fast)
        job = Job(measure_losses, arguments, "an evaluation of candidates", REMEDY, cost=float(max(1, cost)))
        self._units[job] = unit, self._with_plans
        self._workers.submit(job)

    def collect(self) -> tuple[Unit, Losses]:
        while True:
            job = self._workers.collect()
            unit, with_plans = self._units.pop(job)
            try:
                return unit, job.result()
            except UnmaskedError as error:
                if with_plans:
                    raise
                self._send_plans(error)
                self.submit(unit)

    def _send_plans(self, error: UnmaskedError) -> None:
        """Sends plans with later tasks, because a worker could not mask a candidate that the driver can mask."""
        if not self._with_plans:
            logger.warning("a worker cannot mask what the driver can, and is sent plans to cut by: %s", error)
            self._inputs, self._with_plans = self._inputs_with_plans(), True


def measure_losses(inputs: list[Any], positions: Sequence[int], images: np.ndarray, fast: bool = False) -> Losses:
    """What a worker is asked: the losses of some of the iteration's tasks on some of the calibration set's images."""
    engine, tasks = retried(lambda: PROCESS.load(*inputs), "the network of an evaluation task")
    return engine.losses([tasks[position] for position in positions], images, fast)


def statistics_task(
    inputs: list[Any], behind: Collection[str] = (), images: int | None = None
) -> dict[str, np.ndarray]:
    """The iteration's BatchNorm statistics; references inside `inputs` are kept by the process."""
    return pack(reestimate(*PROCESS.network(*inputs), behind, images))
