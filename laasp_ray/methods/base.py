"""An iteration of any method: what it is given, and what it gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from laasp_ray.config import PruneConfig
from laasp_ray.cost.macs import Macs, count_macs
from laasp_ray.errors import ExhaustedError, SearchError
from laasp_ray.pruning.channels import Removal, plan_of
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.joint import joint_removal
from laasp_ray.pruning.masking import mask_of
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.plan import Plan, macs_after
from laasp_ray.records import CandidateLoss, Decision, LayerPrune, Ranking
from laasp_ray.search.candidates import NETWORK_BEFORE, Baseline
from laasp_ray.search.evaluate import LossTask, MeasuredLoss
from laasp_ray.search.executor import Executor

OnCandidate = Callable[[int, int, CandidateLoss | None], None]
"""Hears (how many candidates are done, of how many, which or None) as losses come in."""


@dataclass(frozen=True)
class IterationResult:
    """One iteration of the loop: the choice, the prune that carries it out, the candidates' losses (empty for a method
    that compares none), and seconds by where they went."""

    decision: Decision
    step: Plan
    ranking: Ranking
    seconds: Mapping[str, float]


class Stopwatch:
    """Seconds between laps, by name; those of laps of one name are added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


@dataclass(frozen=True)
class IterationContext:
    """How a run stands when an iteration is taken. A method looks and measures; it changes nothing of it.

    `model` is `network` rebuilt, on the CPU, in eval mode; `example_input` is (1, C, H, W); `iteration` counts from 1.
    """

    model: nn.Module
    network: NetworkState
    example_input: torch.Tensor
    baseline: Baseline
    config: PruneConfig
    executor: Executor
    iteration: int
    on_candidate: OnCandidate
    clock: Stopwatch = field(default_factory=Stopwatch)

    @cached_property
    def graph(self) -> PruningGraph:
        """The dependency graph of `model`."""
        return PruningGraph(
            self.model, self.example_input, ignored=self.config.ignored, extra_layers=self.config.extra_layers
        )

    @cached_property
    def macs(self) -> Macs:
        """The multiply-accumulates of `model`."""
        return count_macs(self.model, self.example_input)

    @cached_property
    def scored(self) -> NetworkState:
        """The network as the executor scores it (`search.reestimate_batchnorm`)."""
        return self.executor.for_scoring(self.network)

    def flops_reduction(self, step: Plan) -> float:
        """The share of the unpruned network's multiply-accumulates that is gone after `step`."""
        return 1 - macs_after(self.macs, step) / self.baseline.macs.total

    def measure(self, removal: Removal, name: str) -> tuple[MeasuredLoss, float]:
        """The loss without these channels, and the network's loss before; `name` is what an error says."""
        tasks = [LossTask(name, plan_of(removal), mask_of(removal)), NETWORK_BEFORE]
        after, before = self.executor.measure(self.scored, tasks, lambda position, result: None, lambda share: None)
        return after, before.loss

    def prune(self, filters: Mapping[str, tuple[int, ...]], criterion: str) -> IterationResult:
        """The iteration in which these filters (rising) of each layer go, chosen without a look at losses.

        Its losses tell what that costs. Raises ExhaustedError if there are none, SearchError if the network that is
        left cannot be evaluated.
        """
        if not filters:
            raise ExhaustedError(
                f"{criterion} chose no filter in iteration {self.iteration}: there is nothing to prune"
            )
        removal = joint_removal(self.graph, filters)
        step = plan_of(removal)
        after, before = self.measure(removal, f"the prune by {criterion}")
        if after.error:
            raise SearchError(f"the network that {criterion} leaves cannot be evaluated: {after.error}")
        self.clock.lap("evaluate")
        first, *further = [
            LayerPrune(layer=layer, criterion=criterion, filters=chosen) for layer, chosen in filters.items()
        ]
        decision = Decision(
            iteration=self.iteration,
            layer=first.layer,
            criterion=first.criterion,
            filters=first.filters,
            loss=after.loss,
            loss_before=before,
            flops_reduction=self.flops_reduction(step),
            further=tuple(further),
        )
        return IterationResult(decision, step, Ranking([]), self.clock.seconds)


PruningMethod = Callable[[IterationContext], IterationResult]
"""A method: it chooses what goes next."""
