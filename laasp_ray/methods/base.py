"""The base class of a pruning method: its checks, its iterations, its cost estimate and its reports."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from laasp_ray.config import Compensate, FilterPruneConfig, PruneConfig, RunConfig
from laasp_ray.cost.macs import Macs, count_macs
from laasp_ray.errors import ConfigError, ExhaustedError, SearchError
from laasp_ray.methods.estimate import Estimate
from laasp_ray.methods.memory import IterationMemory
from laasp_ray.methods.preparation import Preparation, UnprunedNetwork, graph_for, prepare_filters
from laasp_ray.pruning.channels import Removal, plan_of
from laasp_ray.pruning.compensation import NOTHING, MadeUp, apply_compensated
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.joint import joint_removal
from laasp_ray.pruning.masking import mask_of
from laasp_ray.pruning.network import NetworkState, capture
from laasp_ray.pruning.plan import Plan, macs_after, pruned_macs
from laasp_ray.pruning.verify import clone_sharing_parameters
from laasp_ray.records import CandidateLoss, Decision, LayerPrune, MeasuredLoss, Ranking
from laasp_ray.search.candidates import NETWORK_BEFORE, Baseline
from laasp_ray.search.compensating import Compensator, Measured
from laasp_ray.search.evaluate import LossTask
from laasp_ray.search.executor import Executor

CHECKED = 1000
"""The images that a chosen prune is measured on with and without compensation."""

logger = logging.getLogger(__name__)

Section = TypeVar("Section", bound=PruneConfig)
"""The class of a method's section `prune`."""
OnCandidate = Callable[[int, int, CandidateLoss | None], None]
"""Called with (candidates done, candidates in all, the latest or None) whenever a loss arrives."""


@dataclass(frozen=True, kw_only=True)
class IterationResult:
    """The result of one iteration. `seconds` has the time of each part by name.

    `step` is the plan of the prune in `decision`; both are None if no filters are removed. `ranking` has the
    candidates' losses; it is empty for a method that compares no candidates. `network` has new weights of the same
    shapes. `weights` are tensors that have new values after `step`. `masks` (parameter -> packed mask) mark the weights
    that stay zero from now on. `ends_pruning` says whether this was the last iteration; with None the run's targets
    decide. `details` are copied into the event. `text` is the progress line if there is no decision.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    decision: Decision | None = None
    step: Plan | None = None
    ranking: Ranking = field(default_factory=lambda: Ranking([]))
    network: NetworkState | None = None
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    masks: Mapping[str, bytes] | None = None
    ends_pruning: bool | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class FinishedNetwork:
    """The final network of a run of `config`.

    `model` is on the CPU. `example_input` is (1, C, H, W). `masks` were enforced until the end of training.
    """

    config: RunConfig
    model: nn.Module
    example_input: torch.Tensor
    masks: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class MethodReport:
    """A method's report on a finished network: `details` for the run's last event, and `files` for the run's folder."""

    details: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


class Stopwatch:
    """Seconds between laps, summed by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


@dataclass(frozen=True)
class IterationContext(Generic[Section]):
    """The state of a run at the start of an iteration. A method must not change it.

    `model` is `network` rebuilt, on the CPU and in eval mode. `example_input` is (1, C, H, W). `iteration` counts from
    1. `memory` is the same object in all iterations of a run. `measured` is the last trained network, with the prunes
    since; None: `network` itself.
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
    memory: IterationMemory = field(default_factory=IterationMemory)
    measured: Measured | None = None

    @cached_property
    def graph(self) -> PruningGraph:
        """The dependency graph of `model`, derived from the last iteration's if that can be done (following.py)."""
        plan = self.network.plan
        return self.memory.graphs.graph(
            self.model, plan, lambda: graph_for(self.config, self.model, self.example_input)
        )

    @cached_property
    def macs(self) -> Macs:
        """The multiply-accumulates of `model`, derived from the baseline's if that is of the same network."""
        derived = pruned_macs(self.baseline.macs, self.network.plan)
        modules = dict(self.model.named_modules())
        found = {layer: tuple(modules[layer].weight.shape) for layer in derived.per_layer if layer in modules}
        return derived if found == derived.weight_shapes else count_macs(self.model, self.example_input)

    @cached_property
    def scored(self) -> NetworkState:
        """The network that candidates are scored on, with reestimated BatchNorm if `search.reestimate_batchnorm` is
        set.
        """
        return self.executor.for_scoring(self.network)

    def flops_reduction(self, step: Plan) -> float:
        """The share of the unpruned network's multiply-accumulates that is removed after `step`."""
        return 1 - macs_after(self.macs, step) / self.baseline.macs.total

    @property
    def _compensate(self) -> Compensate:
        return self.config.compensate if isinstance(self.config, FilterPruneConfig) else "off"

    @cached_property
    def compensator(self) -> Compensator:
        """What compensates prunes of `model`. Its moments are measured when it is first asked for."""
        return self.memory.compensation.at(
            self.model,
            self.graph,
            self._compensate,
            self.measured or Measured(self.network),
            self.executor.grams,
        )

    def made_up(self, removal: Removal) -> MadeUp:
        """How readers make up for a prune; empty if `prune.compensate` is off."""
        return NOTHING if self._compensate == "off" else self.compensator.made_up(removal)

    def if_it_helps(self, removal: Removal, loss: float) -> tuple[MadeUp, float, dict[str, Any]]:
        """How a chosen prune of this loss is made up for, its loss then, and what the event says of it.

        It is not made up for if its loss is lower without. Both losses are of the same CHECKED images, as an estimate
        of a race could not be compared.
        """
        made_up = self.made_up(removal)
        if not made_up:
            return made_up, loss, {}
        plan, mask = plan_of(removal), mask_of(removal)
        tasks = [
            LossTask("the chosen prune, made up for", plan, mask, made_up),
            LossTask("the chosen prune", plan, mask),
        ]
        with_it, without = self.executor.measure(
            self.scored, tasks, lambda position, result: None, lambda share: None, images=CHECKED
        )
        details = {"loss_compensated": with_it.loss, "loss_uncompensated": without.loss}
        if math.isfinite(with_it.loss) and not without.loss < with_it.loss:
            return made_up, loss, {"compensated": True, **details}
        logger.info(
            "the chosen prune is not made up for: its loss is %g without, %g with it %s",
            without.loss,
            with_it.loss,
            with_it.error,
        )
        changed = loss + without.loss - with_it.loss if math.isfinite(with_it.loss) else without.loss
        return NOTHING, changed, {"compensated": False, **details}

    def carried_out(self, removal: Removal, made_up: MadeUp) -> tuple[Plan, dict[str, torch.Tensor]]:
        """The plan of a prune, and the tensors that have new values after it."""
        step = plan_of(removal)
        reestimates = isinstance(self.config, FilterPruneConfig) and self.config.reestimate_batchnorm
        if not made_up and not reestimates:
            return step, {}
        model = clone_sharing_parameters(self.model)
        norms = self.compensator.norms if made_up else {}
        step = apply_compensated(model, step, made_up, norms)
        after = capture(model, self.network.plan.then(step))
        changed = {f"{layer}.{leaf}" for layer in made_up for leaf in ("weight", "bias")}
        changed |= {f"{norms[layer]}.running_mean" for layer in made_up if layer in norms}
        found = {name: tensor for name, tensor in after.tensors.items() if name in changed}
        if reestimates:
            readers = [side.module for side, channels in removal.items() if channels and side.role == "inputs"]
            found |= self.executor.statistics(after, readers) if readers else {}
        return step, found

    def measure(self, removal: Removal, name: str) -> tuple[MeasuredLoss, float]:
        """The loss without these channels, and the loss of the current network. Errors call the prune `name`."""
        tasks = [LossTask(name, plan_of(removal), mask_of(removal), self.made_up(removal)), NETWORK_BEFORE]
        after, before = self.executor.measure(self.scored, tasks, lambda position, result: None, lambda share: None)
        return after, before.loss

    def prune(self, filters: Mapping[str, tuple[int, ...]], criterion: str) -> IterationResult:
        """The result of an iteration that removes these filters (rising) of each layer, chosen without comparing
        losses.

        The losses before and after are measured for the record. Raises ExhaustedError if there are no filters,
        SearchError if the pruned network cannot be evaluated.
        """
        if not filters:
            raise ExhaustedError(
                f"{criterion} chose no filter in iteration {self.iteration}: there is nothing to prune"
            )
        removal = joint_removal(self.graph, filters)
        after, before = self.measure(removal, f"the prune by {criterion}")
        if after.error:
            raise SearchError(f"the network that {criterion} leaves cannot be evaluated: {after.error}")
        made_up, loss, details = self.if_it_helps(removal, after.loss)
        step, weights = self.carried_out(removal, made_up)
        self.clock.lap("evaluate")
        first, *further = [
            LayerPrune(layer=layer, criterion=criterion, filters=chosen) for layer, chosen in filters.items()
        ]
        decision = Decision(
            iteration=self.iteration,
            layer=first.layer,
            criterion=first.criterion,
            filters=first.filters,
            loss=loss,
            loss_before=before,
            flops_reduction=self.flops_reduction(step),
            further=tuple(further),
        )
        return IterationResult(
            decision=decision, step=step, weights=weights, details=details, seconds=self.clock.seconds
        )


class PruningMethod(ABC, Generic[Section]):
    """Chooses what to prune next. A method is one object without state; the loop calls it once per iteration.

    A method of your own must define `iterate`. The other methods have defaults for a method that removes filters.
    """

    config_class: ClassVar[type[PruneConfig]] = FilterPruneConfig
    """The class of the section `prune`; a run's section is an instance of it."""
    measures_losses: ClassVar[bool] = True
    """Whether an iteration uses the executor. If not, no calibration images are drawn."""

    @abstractmethod
    def iterate(self, context: IterationContext[Section]) -> IterationResult:
        """Carries out one iteration. Raises ExhaustedError when nothing is left to prune."""

    def prepare(self, network: UnprunedNetwork) -> Preparation:
        """Checks the run before anything expensive. Raises ConfigError if it cannot be carried out."""
        return prepare_filters(network)[0]

    def estimate(self, network: UnprunedNetwork, prepared: Preparation, calibration_images: int) -> Estimate:
        """The cost of pruning, for the dry run. Raises ConfigError if it is not known."""
        raise ConfigError(
            f"what an iteration of prune.method {network.config.prune.method!r} costs is not known: run it "
            "without --dry-run, or give its class an `estimate`"
        )

    def title(self, config: Section, number: int) -> str:
        """The name of iteration `number` (from 1), shown when it begins."""
        return f"iteration {number}"

    def report(self, finished: FinishedNetwork) -> MethodReport:
        """The report at the run's end."""
        return MethodReport()

    def result(self, details: Mapping[str, Any]) -> str:
        """The result in one line, from the report's details. Empty if the reductions of the targets say everything."""
        return ""
