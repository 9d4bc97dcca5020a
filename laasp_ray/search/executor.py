"""The protocol for measuring the losses of an iteration, and the executor that works in this process, unit by unit."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from laasp_ray.config import SearchConfig
from laasp_ray.errors import SearchError
from laasp_ray.pruning.network import NetworkState, rebuild
from laasp_ray.pruning.readers import Reader
from laasp_ray.records import MeasuredLoss
from laasp_ray.search.activations import ImportanceRequest, importance
from laasp_ray.search.batchnorm import ENOUGH, reestimate, with_statistics
from laasp_ray.search.engine import Cost, Engine, Losses
from laasp_ray.search.evaluate import Calibration, LossTask, ready_with
from laasp_ray.search.grams import Grams, grams
from laasp_ray.search.race_memory import RaceMemory
from laasp_ray.search.schedule import OnResult, OnShare, Settings, Unit, measure


class Executor(Protocol):
    def for_scoring(self, network: NetworkState) -> NetworkState:
        """The network that an iteration's candidates are scored on.

        It is `network` itself, or with `search.reestimate_batchnorm` the network with BatchNorm statistics that are
        measured again (search/batchnorm.py).
        """

    def measure(
        self,
        network: NetworkState,
        tasks: Sequence[LossTask],
        on_result: OnResult,
        on_share: OnShare,
        images: int | None = None,
        memory: RaceMemory | None = None,
    ) -> list[MeasuredLoss]:
        """The losses of `tasks` on `network`, in their order. The last task is the current network, if they race.

        A race uses `memory` and leaves its choice there. With `images` only so many images are used, the first of the
        calibration set, which is shuffled. `on_result` is called with each loss when it is final, in any order.
        `on_share` is called with the share of the work that is done, if it is known. A task that fails has an `error`
        and does not stop the others.
        """

    def importance(self, network: NetworkState, wanted: ImportanceRequest) -> Mapping[str, torch.Tensor]:
        """The scores of filters by a criterion of data. Errors are those of search/activations.py."""

    def grams(self, network: NetworkState, readers: Sequence[Reader]) -> Grams:
        """The sums of products of these layers' inputs (search/grams.py)."""

    def statistics(self, network: NetworkState, behind: Collection[str]) -> Mapping[str, torch.Tensor]:
        """The statistics of the BatchNorms that run after one of the layers `behind`, measured again on some of the
        images (search/batchnorm.py)."""

    def close(self) -> None: ...


def _no_executor() -> SearchError:
    return SearchError("a method whose measures_losses is False has no executor: set it to True")


class _NoExecutor:
    """The executor of a method that measures no losses."""

    def for_scoring(self, network: NetworkState) -> NetworkState:
        return network

    def measure(
        self,
        network: NetworkState,
        tasks: Sequence[LossTask],
        on_result: OnResult,
        on_share: OnShare,
        images: int | None = None,
        memory: RaceMemory | None = None,
    ) -> list[MeasuredLoss]:
        raise _no_executor()

    def importance(self, network: NetworkState, wanted: ImportanceRequest) -> Mapping[str, torch.Tensor]:
        raise _no_executor()

    def grams(self, network: NetworkState, readers: Sequence[Reader]) -> Grams:
        raise _no_executor()

    def statistics(self, network: NetworkState, behind: Collection[str]) -> Mapping[str, torch.Tensor]:
        raise _no_executor()

    def close(self) -> None:
        return None


NO_EXECUTOR = _NoExecutor()


class InProcessExecutor:
    """The serial executor. Its losses are the reference for every other executor."""

    def __init__(
        self, unpruned: nn.Module, calibration: Calibration, device: torch.device, search: SearchConfig, seed: int
    ) -> None:
        self._unpruned, self._calibration = unpruned, calibration.to(device)
        self._search, self._seed = search, seed
        self._last: tuple[NetworkState, Engine] | None = None

    def for_scoring(self, network: NetworkState) -> NetworkState:
        if not self._search.reestimate_batchnorm:
            return network
        return with_statistics(network, reestimate(*self._ready(network)))

    def measure(
        self,
        network: NetworkState,
        tasks: Sequence[LossTask],
        on_result: OnResult,
        on_share: OnShare,
        images: int | None = None,
        memory: RaceMemory | None = None,
    ) -> list[MeasuredLoss]:
        backend = SerialBackend(self._engine(network), tasks)
        settings = settings_of(self._search, min(images or len(self._calibration), len(self._calibration)), self._seed)
        return measure(backend, len(tasks), settings, on_result, on_share, memory)

    def importance(self, network: NetworkState, wanted: ImportanceRequest) -> Mapping[str, torch.Tensor]:
        return importance(*self._ready(network), wanted)

    def grams(self, network: NetworkState, readers: Sequence[Reader]) -> Grams:
        return grams(*self._ready(network), readers, self._search.memory_bytes)

    def statistics(self, network: NetworkState, behind: Collection[str]) -> Mapping[str, torch.Tensor]:
        return reestimate(*self._ready(network), behind, ENOUGH)

    def close(self) -> None:
        return None

    def _engine(self, network: NetworkState) -> Engine:
        """The engine of `network`. That of the last network is kept: an iteration measures its network twice, and to
        trace a network takes as long as to measure a few candidates.
        """
        if self._last is None or self._last[0] is not network:
            self._last = None  # first, so that two are never in memory together
            search = self._search
            engine = Engine(*self._ready(network), memory_bytes=search.memory_bytes, precision=search.precision)
            self._last = network, engine
        return self._last[1]

    def _ready(self, network: NetworkState) -> tuple[nn.Module, Calibration]:
        return ready_with(rebuild(self._unpruned, network), self._calibration)


class SerialBackend:
    """Processes units in this process, in the order in which they were submitted."""

    slots = 1

    def __init__(self, engine: Engine, tasks: Sequence[LossTask]) -> None:
        self._engine, self._tasks = engine, tasks
        self._queue: deque[Unit] = deque()

    def cost(self, task: int) -> Cost:
        return self._engine.branch_points.cost(self._tasks[task])

    def submit(self, unit: Unit) -> None:
        self._queue.append(unit)

    def collect(self) -> tuple[Unit, Losses]:
        unit = self._queue.popleft()
        return unit, self._engine.losses([self._tasks[task] for task in unit.tasks], unit.images, unit.fast)


def settings_of(search: SearchConfig, images: int, seed: int) -> Settings:
    """The settings of a search on a calibration set of `images` images."""
    return Settings(
        images=images,
        batch_size=search.batch_size,
        candidates_per_task=search.candidates_per_task,
        racing=search.racing == "on",
        fast=search.precision == "bfloat16",
        racing_error=search.racing_error,
        racing_margin=search.racing_margin,
        racing_growth=search.racing_growth,
        racing_memory=search.racing_memory == "on",
        seed=seed,
    )
