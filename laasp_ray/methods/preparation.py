"""The checks of a method before a run: the network can be pruned as configured, and can be trained before and after
that.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from laasp_ray.config import TARGET_ROUNDING, FilterPruneConfig, PruneConfig, RunConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.errors import ConfigError
from laasp_ray.methods.targets import check_latency_batch
from laasp_ray.models.copying import deep_copy
from laasp_ray.pruning.graph import PruningGraph, reachable, reachable_parameters
from laasp_ray.pruning.joint import independent_layers
from laasp_ray.pruning.network import NetworkState
from laasp_ray.search.batchnorm import check_statistics, norms_of
from laasp_ray.search.candidates import Baseline, measure_baseline
from laasp_ray.tasks import CLASSIFICATION, Task
from laasp_ray.train.check import check_training

logger = logging.getLogger(__name__)


Section = TypeVar("Section", bound=PruneConfig)


def section_of(config: RunConfig, kind: type[Section]) -> Section:
    """`config.prune` as the `kind` of section that a method has. The method is chosen by its section, so it is one."""
    assert isinstance(config.prune, kind)
    return config.prune


@dataclass(frozen=True, kw_only=True)
class UnprunedNetwork:
    """The network that a run of `config` prunes.

    `model` is on the CPU and has the run's initial weights. `example_input` is (1, C, H, W). `started` is True for a
    run that is resumed. `task` has its loss and data.
    """

    config: RunConfig
    model: nn.Module
    example_input: torch.Tensor
    started: bool = False
    task: Task = CLASSIFICATION

    def graph(self) -> PruningGraph:
        """Builds the network's dependency graph."""
        return graph_for(self.config.prune, self.model, self.example_input)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Results of a method's checks that the run uses again.

    `baseline` is measured once, on the unpruned network. `begun_with` is the pruned network that the run begins with.
    It is None if the run begins with the unpruned network or is resumed.
    """

    baseline: Baseline
    begun_with: NetworkState | None = None


def graph_for(config: PruneConfig, model: nn.Module, example_input: torch.Tensor) -> PruningGraph:
    """The dependency graph of `model`, with the `ignored` and `extra_layers` of the section `prune`."""
    extra = config.extra_layers if isinstance(config, FilterPruneConfig) else ()
    return PruningGraph(model, example_input, ignored=config.ignored, extra_layers=extra)


def plain_baseline(model: nn.Module, example_input: torch.Tensor) -> Baseline:
    """The baseline of a run that removes no filters."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Baseline(count_macs(model, example_input), parameters, step_sizes={}, filters={}, skipped={})


def prepare_filters(
    network: UnprunedNetwork, *, independent: bool = False, max_pruned: float | None = None
) -> tuple[Preparation, PruningGraph]:
    """Checks a run that removes filters. Also returns the network's dependency graph.

    `independent`: only layers that are coupled to no others are pruned. `max_pruned` is the largest share of a layer's
    filters that may be removed; None: all but one. Raises ConfigError if no layer can be pruned, a target is out of
    reach, or the network cannot be trained before or after pruning.
    """
    config, model = network.config, network.model
    prune = config.prune
    if not isinstance(prune, FilterPruneConfig):
        raise ConfigError(
            f"prune.method {prune.method!r} removes filters, but its section is a {type(prune).__name__}: its "
            "config_class must be a subclass of FilterPruneConfig"
        )
    check_statistics(model)
    graph, macs = network.graph(), count_macs(model, network.example_input)
    baseline = measure_baseline(graph, macs, prune)
    for name, reason in graph.skipped.items():
        logger.info("layer %s is not pruned: %s", name, reason)
    _check_target(prune, graph, baseline, independent_layers(graph) if independent else tuple(graph.layers), max_pruned)
    check_training(model, config.model.input_shape, config.train, graph, network.task)
    if config.search.reestimate_batchnorm and not norms_of(model):
        raise ConfigError(
            "search.reestimate_batchnorm is True, but the network has no BatchNorm that keeps statistics: leave it out"
        )
    if prune.latency_reduction:
        check_latency_batch(deep_copy(model), config)
    return Preparation(baseline=baseline), graph


def _check_target(
    prune: FilterPruneConfig,
    graph: PruningGraph,
    baseline: Baseline,
    layers: Sequence[str],
    max_pruned: float | None,
) -> None:
    if not graph.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(graph.skipped.items())[:3])
        raise ConfigError(f"no layer of the network can be pruned ({reasons}): ignore fewer layers")
    if not layers:
        raise ConfigError(
            f"prune.method is {prune.method!r}, but all layers of this network are coupled to others: use 'laasp'"
        )
    limit, named, remedy = 1.0, f"method {prune.method}", "lower it, or set prune.iterations"
    if max_pruned is not None:
        limit, named, remedy = max_pruned, f"max_pruned {max_pruned:g}", "lower the one or raise the other"
    if prune.round_to > 1:
        named += f", prune.round_to {prune.round_to}"
        remedy += ", or lower prune.round_to"
    most = {
        "flops_reduction": reachable(graph, baseline.macs, max_pruned=limit, layers=layers, round_to=prune.round_to),
        "parameters_reduction": reachable_parameters(graph, max_pruned=limit, layers=layers, round_to=prune.round_to),
    }
    for key, share in most.items():  # the reduction of latency is not known before it is measured
        target = getattr(prune, key)
        if share < target - TARGET_ROUNDING and prune.iterations == 0:
            raise ConfigError(
                f"prune.{key} is {target:g}, but with prune.{named} and {len(layers)} prunable layers at most "
                f"{share:.4f} can be reached: {remedy}"
            )
    if not any(most.values()):
        raise ConfigError(f"with prune.{named} none of {len(layers)} layers can give a single filter: {remedy}")
