"""Who measures the losses of a turn: the protocol, and the executor that works in this process, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from laasp_ray.pruning.network import NetworkState, rebuild
from laasp_ray.search.evaluate import LossSubset, LossTask, MeasuredLoss, measure_all, ready

OnResult = Callable[[int, MeasuredLoss], None]


class Executor(Protocol):
    def measure(self, network: NetworkState, tasks: Sequence[LossTask], on_result: OnResult) -> list[MeasuredLoss]:
        """The losses of `tasks` on `network`, in their order; `on_result` hears of each as it comes, in any order."""

    def close(self) -> None: ...


class InProcessExecutor:
    """The serial reference; what every other executor's answer is compared with."""

    def __init__(self, unpruned: nn.Module, subset: LossSubset, device: torch.device) -> None:
        self._unpruned, self._subset, self._device = unpruned, subset.to(device), device

    def measure(self, network: NetworkState, tasks: Sequence[LossTask], on_result: OnResult) -> list[MeasuredLoss]:
        model = ready(rebuild(self._unpruned, network), self._device)
        return measure_all(model, tasks, self._subset, on_result)

    def close(self) -> None:
        return None
