"""The search: candidates, their losses and the choice. `rank` carries out one iteration on any network without a
cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from laasp_ray.config import (
    COMPENSATED_CRITERIA,
    DEFAULT_CRITERIA,
    Compensate,
    DataConfig,
    LaaspConfig,
    SearchConfig,
    StepRule,
)
from laasp_ray.cost.macs import count_macs
from laasp_ray.criteria import looks_at_data
from laasp_ray.criteria.obs import NAME as OBS
from laasp_ray.data.examples.source import OwnData
from laasp_ray.errors import PruningError
from laasp_ray.models.copying import deep_copy
from laasp_ray.models.suitable import check_suitable
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.pruning.channels import Removal
from laasp_ray.pruning.compensation import MadeUp
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.records import Ranking
from laasp_ray.search.activations import ImportanceRequest, importance
from laasp_ray.search.arguments import EXAMPLES, calibration_of, checked_search, example_of, listed, taken_by
from laasp_ray.search.batchnorm import check_statistics
from laasp_ray.search.candidates import counts_of, measure_baseline, not_made_up, propose, ranking_of, tasks_of
from laasp_ray.search.compensating import CompensationMemory, Measured
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import Calibration, Prepare
from laasp_ray.search.executor import SerialBackend, settings_of
from laasp_ray.search.grams import grams
from laasp_ray.search.schedule import measure
from laasp_ray.tasks.registry import task_from

__all__ = ["rank"]


@random_state_kept()
def rank(
    model: nn.Module,
    images: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    *,
    data: OwnData | Callable[..., Any] | None = None,
    loss: Callable[..., Any] | None = None,
    examples: int = EXAMPLES,
    input_shape: Sequence[int] | None = None,
    criteria: Sequence[str] | None = None,
    step: float = 0.01,
    step_rule: StepRule = "flops_share",
    max_pruned: float = 0.75,
    ignored: Sequence[str] = (),
    extra_layers: Sequence[str] = (),
    reference: nn.Module | None = None,
    batch_size: int = 250,
    prepare: Prepare | None = None,
    racing: bool = False,
    racing_error: float = 0.01,
    memory_mb: int = 0,
    components: int = 2,
    pooling: str = "max",
    compensate: Compensate = "full",
    seed: int = 0,
) -> Ranking:
    """Every prune that one iteration of LAASP could make on `model`, with its loss, lowest loss first.

    `images` (n, C, H, W) are inputs of the network, or `prepare` turns each batch of them into inputs. `labels` (n,)
    are class indices. Both are on the model's device. `reference` is the unpruned network for step sizes, limits and
    FLOPs reductions (default: `model` itself). An entry has `.layer`, `.criterion`, `.filters`, `.flops_reduction`
    after its prune, and `.loss`, the mean cross-entropy over all images. An entry that failed has an `.error` and comes
    last. `model` is not changed.

    `loss` replaces the cross-entropy, and `data` images and labels, both as in `prune` (docs/own-task.md): `data` is a
    function of the split, called with "train", or an `OwnData`, of which `examples` are drawn as a run of the same seed
    draws them; `loss` gives a value for each example. With images `labels` may then be any tensor (n, ...) that the
    loss takes as targets. `input_shape` (C, H, W) is needed if inputs are no tensor.

    With `racing`, candidates that are worse with confidence see few images. Their `.loss` is an estimate from `.images`
    images, and `.dropped_at` is the round that dropped them. `.dropped_at` is None for the choice and others that were
    measured on all images, which come first. With a probability of at least 1 - `racing_error` the choice is the same
    as without racing. `seed` draws the samples. Criteria of data get `components` and `pooling` if they accept them:
    pls fits that many components to outputs pooled that way. The values of a forward pass use at most `memory_mb` (0: a
    share of the free memory). The layers that read the removed channels make up for them, so losses are those after
    compensation; with `compensate` off, what these channels gave is lost. `criteria` are the paper's four by default,
    and obs with compensation.

    Source: Ghimire, Lee, Kim, Image and Vision Computing 136 (2023) 104745.
    Raises ConfigError for settings, images, labels and outputs that do not fit, PruningError for networks that do not
    work, with why not for each layer where none can be pruned, and SearchError for candidates that do not.
    """
    search = checked_search(batch_size, memory_mb, racing=racing, racing_error=racing_error)
    config = LaaspConfig(
        flops_reduction=0.0,
        step=step,
        step_rule=step_rule,
        max_pruned=max_pruned,
        ignored=listed("ignored", ignored),
        extra_layers=listed("extra_layers", extra_layers),
        criteria=_pool(compensate) if criteria is None else listed("criteria", criteria),
        components=components,
        pooling=pooling,
        compensate=compensate,
    )
    for network in (model,) if reference is None else (model, reference):
        check_suitable(network)
    calibration = calibration_of(
        model,
        images,
        labels,
        task_from(DataConfig(), data=data, loss=loss),
        examples=examples,
        batch_size=batch_size,
        prepare=prepare,
        seed=seed,
    )
    check_statistics(model)
    with random_state_kept():  # a network may draw from the global generators
        return _rank(deep_copy(model), calibration, config, search, reference, seed, input_shape)


def _pool(compensate: Compensate) -> tuple[str, ...]:
    return DEFAULT_CRITERIA if compensate == "off" else COMPENSATED_CRITERIA


def _rank(
    model: nn.Module,
    calibration: Calibration,
    config: LaaspConfig,
    search: SearchConfig,
    reference: nn.Module | None,
    seed: int,
    input_shape: Sequence[int] | None,
) -> Ranking:
    """As `rank`, for a copy of the model that may be changed."""
    model, calibration = taken_by(model, calibration)
    example = example_of(calibration, input_shape)

    def graph_of(network: nn.Module) -> PruningGraph:
        return PruningGraph(network, example, ignored=config.ignored, extra_layers=config.extra_layers)

    graph, macs = graph_of(model), count_macs(model, example)
    if not graph.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in graph.skipped.items())
        raise PruningError(f"no layer of the network can be pruned ({reasons or 'it has no convolution'})")
    if reference is None:
        baseline = measure_baseline(graph, macs, config)
    else:
        baseline = measure_baseline(graph_of(reference), count_macs(reference, example), config)
    given: dict[str, Mapping[str, torch.Tensor]] = {
        name: importance(model, calibration, ImportanceRequest.of(graph.layers, name, config))
        for name in config.criteria
        if looks_at_data(name)
    }
    made_up: Callable[[Removal], MadeUp] = not_made_up
    if config.compensate != "off" or OBS in config.criteria:
        compensator = CompensationMemory().at(
            model,
            graph,
            config.compensate,
            Measured(capture(model, Plan.empty())),
            lambda network, readers: grams(model, calibration, readers, search.memory_bytes),
        )
        if OBS in config.criteria:
            given[OBS] = compensator.obs_scores(model, graph, counts_of(graph, macs, baseline, config))
        if config.compensate != "off":
            made_up = compensator.made_up
    proposals = propose(model, graph, macs, baseline, config, given, made_up=made_up)
    tasks = tasks_of(proposals)
    backend = SerialBackend(Engine(model, calibration, memory_bytes=search.memory_bytes), tasks)
    results = measure(backend, len(tasks), settings_of(search, len(calibration), seed), lambda position, result: None)
    return ranking_of(proposals, results)
