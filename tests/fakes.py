"""What stands in tests for the parts that a run is handed: typed, checked by mypy, and strict about their calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

import torch

from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.readers import Reader
from laasp_ray.records import MeasuredLoss, RunState
from laasp_ray.run.events import Happening, Observer
from laasp_ray.search.activations import ImportanceRequest
from laasp_ray.search.evaluate import LossTask
from laasp_ray.search.executor import Executor
from laasp_ray.search.grams import Grams
from laasp_ray.search.race_memory import RaceMemory
from laasp_ray.search.schedule import OnResult, OnShare


class Silent(Observer):
    """An observer that shows nothing and remembers what happened, with the state after it.

    It refuses what is no event, and events after it was closed.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[Happening, RunState]] = []
        self._closed = False

    def on_event(self, event: Happening, state: RunState) -> None:
        assert isinstance(event, get_args(Happening)), f"{event!r} is no event of a run"
        assert isinstance(state, RunState), f"{state!r} is no state of a run"
        assert not self._closed, f"{event!r} came after the observer was closed"
        self.seen.append((event, state))

    def close(self) -> None:
        self._closed = True

    def of(self, kind: type) -> list[Any]:
        """The events of this type, in order."""
        return [event for event, _ in self.seen if isinstance(event, kind)]


class FakeExecutor(Executor):
    """An executor that scores networks as they are and refuses all else; a test's own says what it answers."""

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
        raise AssertionError(f"no losses should be asked for, {len(tasks)} are")

    def importance(self, network: NetworkState, wanted: ImportanceRequest) -> Mapping[str, torch.Tensor]:
        raise AssertionError(f"no importance should be asked for, that of {wanted.layers} is")

    def grams(self, network: NetworkState, readers: Sequence[Reader]) -> Grams:
        raise AssertionError(f"no moments should be asked for, those of {readers} are")

    def statistics(self, network: NetworkState, behind: Collection[str]) -> Mapping[str, torch.Tensor]:
        raise AssertionError(f"no statistics should be asked for, those behind {behind} are")

    def close(self) -> None:
        return None


class Scripted(FakeExecutor):
    """An executor that answers with given losses, by (layer, criterion), and with `joint` for the chosen together."""

    def __init__(self, losses: Mapping[tuple[str, str], float | MeasuredLoss], joint: float = 0.75) -> None:
        self._losses, self._together = losses, joint
        self.asked: list[Sequence[LossTask]] = []

    def measure(
        self,
        network: NetworkState,
        tasks: Sequence[LossTask],
        on_result: OnResult,
        on_share: OnShare,
        images: int | None = None,
        memory: RaceMemory | None = None,
    ) -> list[MeasuredLoss]:
        self.asked.append(tasks)
        if len(tasks) == 2 and len(self.asked) == 2:
            return [MeasuredLoss(self._together, 10, 0.0), MeasuredLoss(0.25, 10, 0.0)]
        results = []
        for task in tasks[:-1]:
            layer, _, rest = task.name.partition(" by ")
            given = self._losses.get((layer, rest.partition(" (")[0]), 9.0)
            results.append(given if isinstance(given, MeasuredLoss) else MeasuredLoss(given, 10, 0.0))
        return [*results, MeasuredLoss(0.25, 10, 0.0)]
