"""What a method of pruning is: what it checks, one iteration of it, what it will cost, how it describes itself."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from laasp_ray.config import FilterPruneConfig, PruneConfig, RunConfig
from laasp_ray.cost.macs import Macs, count_macs
from laasp_ray.errors import ConfigError, ExhaustedError, SearchError
from laasp_ray.methods.estimate import Estimate
from laasp_ray.methods.preparation import Preparation, UnprunedNetwork, graph_for, prepare_filters
from laasp_ray.pruning.channels import Removal, plan_of
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.joint import joint_removal
from laasp_ray.pruning.masking import mask_of
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.plan import Plan, macs_after
from laasp_ray.records import CandidateLoss, Decision, LayerPrune, MeasuredLoss, Ranking
from laasp_ray.search.candidates import NETWORK_BEFORE, Baseline
from laasp_ray.search.evaluate import LossTask
from laasp_ray.search.executor import Executor

Section = TypeVar("Section", bound=PruneConfig)
"""The class of a method's section `prune`."""
OnCandidate = Callable[[int, int, CandidateLoss | None], None]
"""Hears (how many candidates are done, of how many, which or None) as losses come in."""


@dataclass(frozen=True, kw_only=True)
class IterationResult:
    """What one iteration came to; `seconds` by where they went.

    `step` is the prune that `decision` chose, None where no filters go; `ranking` has the candidates' losses (empty for
    a method that compares none). `network` has other weights of the same shapes, `masks` (parameter -> packed) those
    that stay zero from now on. `ends_pruning` is the method's own word on whether this was the last iteration; None
    leaves it to the run's targets. `details` go into the event as they are, `text` is a line for people where there is
    no decision.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    decision: Decision | None = None
    step: Plan | None = None
    ranking: Ranking = field(default_factory=lambda: Ranking([]))
    network: NetworkState | None = None
    masks: Mapping[str, bytes] | None = None
    ends_pruning: bool | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class FinishedNetwork:
    """The network that a run of `config` ends with: `model` on the CPU, `example_input` (1, C, H, W), the masks that
    held."""

    config: RunConfig
    model: nn.Module
    example_input: torch.Tensor
    masks: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class MethodReport:
    """What a method tells of a finished network: `details` for the last event, and `files` for the run's folder."""

    details: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


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
class IterationContext(Generic[Section]):
    """How a run stands when an iteration is taken. A method looks and measures; it changes nothing of it.

    `model` is `network` rebuilt, on the CPU, in eval mode; `example_input` is (1, C, H, W); `iteration` counts from 1.
    """

    model: nn.Module
    network: NetworkState
    example_input: torch.Tensor
    baseline: Baseline
    config: Section
    executor: Executor
    iteration: int
    on_candidate: OnCandidate
    masks: Mapping[str, bytes] = field(default_factory=dict)
    clock: Stopwatch = field(default_factory=Stopwatch)

    @cached_property
    def graph(self) -> PruningGraph:
        """The dependency graph of `model`."""
        return graph_for(self.config, self.model, self.example_input)

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
        return IterationResult(decision=decision, step=step, seconds=self.clock.seconds)


class PruningMethod(ABC, Generic[Section]):
    """A way to choose what is pruned next: one object without a state, of which the loop asks an iteration at a time.

    What a method of your own must write is `iterate`; the rest is that of a method that removes filters.
    """

    config_class: ClassVar[type[PruneConfig]] = FilterPruneConfig
    """The section `prune` of its runs: this class or a subclass of it."""
    measures_losses: ClassVar[bool] = True
    """Whether an iteration uses its executor; without, no calibration images are drawn."""

    @abstractmethod
    def iterate(self, context: IterationContext[Section]) -> IterationResult:
        """One iteration. Raises ExhaustedError when nothing is left to prune."""

    def prepare(self, network: UnprunedNetwork) -> Preparation:
        """Checks, before anything expensive, that the run can be made. Raises ConfigError where it cannot."""
        return prepare_filters(network)[0]

    def estimate(self, network: UnprunedNetwork, prepared: Preparation, calibration_images: int) -> Estimate:
        """What pruning will take, for the dry run. Raises ConfigError where that is not known."""
        raise ConfigError(
            f"what an iteration of prune.method {network.config.prune.method!r} costs is not known: run it "
            "without --dry-run, or give its class an `estimate`"
        )

    def title(self, config: Section, number: int) -> str:
        """What iteration `number` (from 1) is called as it begins."""
        return f"iteration {number}"

    def report(self, finished: FinishedNetwork) -> MethodReport:
        """What there is to tell at a run's end."""
        return MethodReport()

    def result(self, details: Mapping[str, Any]) -> str:
        """The result in one line, of the report's details; empty: what is gone of each target tells all."""
        return ""
