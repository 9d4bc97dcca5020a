"""What a run consists of, counted before it starts: its epochs, and its iterations or stages with what each
evaluates."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from laasp_ray.config import PruneConfig, RunConfig, SparsityConfig
from laasp_ray.config.names import is_import_path
from laasp_ray.criteria import looks_at_data
from laasp_ray.data.ordering import derive_seed
from laasp_ray.errors import ConfigError
from laasp_ray.methods.group_sparsity import layer_rules
from laasp_ray.models.copying import deep_copy
from laasp_ray.pruning.graph import PruningGraph, reachable, reachable_parameters
from laasp_ray.pruning.joint import independent_layers
from laasp_ray.pruning.network import rebuild
from laasp_ray.pruning.plan import parameters_after
from laasp_ray.records import Phase
from laasp_ray.run.preflight import Prepared
from laasp_ray.run.state import initial_state, next_training_phase
from laasp_ray.search.candidates import propose, tasks_of
from laasp_ray.search.engine import BranchPoints
from laasp_ray.train.loop import EpochPlan

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of every layer's filters that PLS's prunes are counted at; what lies between is on a straight line."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Of any run: `epochs` by phase, and `evaluations` on the test images: before the first prune, after each
    fine-tuning, at the end, and between the epochs before and after pruning as `train.test_every` says. One that prunes
    nothing has no more than this."""

    epochs: Mapping[str, int]
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class Iterations(Workload):
    """Of a run that removes filters.

    `removes` is the mean share of FLOPs that a candidate takes, or an iteration of PLS. `passes` is what an iteration
    measures, in forward passes of the unpruned network over the `calibration_images`; `preparing_s` what it took to
    make it ready here.
    """

    iterations: int
    fine_tunes: int
    removes: float
    passes: float
    calibration_images: int
    preparing_s: float


@dataclass(frozen=True, kw_only=True)
class LaaspIterations(Iterations):
    """`proposals` and `candidates` (distinct) are the first iteration's."""

    proposals: int
    candidates: int


@dataclass(frozen=True, kw_only=True)
class PlsIterations(Iterations):
    """`layers` that filters may go of, how many `filters` these have, and how many go in the `first` iteration."""

    layers: int
    filters: int
    first: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`layers`: how many weights of every group are pruned -> in how many layers. Of their `weights` `kept` are left;
    `epochs` of training follow."""

    layers: Mapping[int, int]
    weights: int
    kept: int
    epochs: int


@dataclass(frozen=True, kw_only=True)
class SparseStages(Workload):
    """Of a run that makes groups sparse. `dense`: layers that stay so -> why."""

    stages: tuple[Stage, ...]
    dense: Mapping[str, str]


def workload_of(prepared: Prepared) -> Workload:
    """The whole run's, whatever of it may be done already."""
    config = prepared.config
    if config.sparsity is not None:
        return _sparse(prepared, config.sparsity)
    if not config.prunes:
        return Workload(epochs=_epochs(config, 0), evaluations=_evaluations(config, 0))
    if is_import_path(config.prune.method):
        raise ConfigError(
            f"what an iteration of prune.method {config.prune.method!r} costs is not known: run it without --dry-run"
        )
    return _pls(prepared) if config.prune.method == "pls" else _laasp(prepared)


def network_of(prepared: Prepared) -> nn.Module:
    """What the run begins with: the unpruned network, or the pruned one of the run that it goes on with."""
    begun_with = prepared.begun_with
    return prepared.unpruned if begun_with is None else rebuild(prepared.unpruned, begun_with)


def _laasp(prepared: Prepared) -> LaaspIterations:
    config, prune = prepared.config, prepared.config.prune
    started = time.perf_counter()
    graph = _graph(prepared)
    drawn = {name: _drawn_scores(graph, name, config.seed) for name in prune.criteria if looks_at_data(name)}
    proposals = propose(prepared.unpruned, graph, prepared.baseline.macs, prepared.baseline, prune, drawn)
    preparing = time.perf_counter() - started
    branch_points = BranchPoints(deep_copy(prepared.unpruned).eval(), prepared.example_input)
    *costs, whole = (branch_points.cost(task).own for task in tasks_of(proposals))
    removes = sum(proposal.candidate.flops_reduction for proposal in proposals) / len(proposals)
    left = sum(parameters_after(graph.shapes, proposal.step) for proposal in proposals) / len(proposals)
    each = {"FLOPs": removes, "parameters": 1 - left / prepared.baseline.parameters, "latency": removes}
    prunes = max(share / each[of] for of, share in prune.targets.items())
    iterations = max(1, math.ceil(prunes / prune.prunes_per_iteration - 1e-9))
    iterations = min(iterations, prune.iterations or iterations)
    between = max(1, math.ceil(prune.fine_tune_every / (removes * prune.prunes_per_iteration) - 1e-9))
    fine_tunes = iterations // between if prune.fine_tune_epochs else 0
    return LaaspIterations(
        epochs=_epochs(config, fine_tunes),
        evaluations=_evaluations(config, fine_tunes),
        iterations=iterations,
        fine_tunes=fine_tunes,
        removes=removes,
        # Besides the candidates: the network as it stands, its statistics, what criteria of data look at, what
        # several prunes come to together.
        passes=sum(costs) / whole
        + (1 + config.search.reestimate_batchnorm + len(drawn) + 2 * (prune.prunes_per_iteration > 1)),
        calibration_images=_calibration_images(prepared),
        preparing_s=preparing,
        proposals=sum(1 + len(proposal.candidate.also) for proposal in proposals),
        candidates=len(proposals),
    )


def _pls(prepared: Prepared) -> PlsIterations:
    config, prune = prepared.config, prepared.config.prune
    started = time.perf_counter()
    graph = _graph(prepared)
    layers = independent_layers(graph)
    preparing = time.perf_counter() - started
    filters = sum(graph.layers[layer].filters for layer in layers)
    gone = _gone_after(filters, _gone_with(prepared, graph, layers), prune)
    fine_tunes = _fine_tunes(gone, prune)
    return PlsIterations(
        epochs=_epochs(config, fine_tunes),
        evaluations=_evaluations(config, fine_tunes),
        iterations=len(gone),
        fine_tunes=fine_tunes,
        removes=gone[-1] / len(gone),
        # The scores, and the losses without what goes and of the network as it stands.
        passes=3 + config.search.reestimate_batchnorm,
        calibration_images=_calibration_images(prepared),
        preparing_s=preparing,
        layers=len(layers),
        filters=filters,
        first=_removed(filters, prune.percent),
    )


def _sparse(prepared: Prepared, sparsity: SparsityConfig) -> SparseStages:
    config, network = prepared.config, network_of(prepared)
    *earlier, _ = sparsity.all_stages
    following = [*(config.prune.fine_tune_epochs for _ in earlier), config.train.epochs - config.train.prune_epoch]
    stages = []
    for pruned, epochs in zip(sparsity.all_stages, following, strict=True):
        layers = layer_rules(network, sparsity, config.prune.ignored, pruned)
        shapes = {layer: network.get_parameter(f"{layer}.weight").shape for layer in layers.rules}
        stages.append(
            Stage(
                layers=Counter(rule.pruned_per_group for rule in layers.rules.values()),
                weights=sum(shape.numel() for shape in shapes.values()),
                kept=sum(rule.kept_in(shapes[layer]) for layer, rule in layers.rules.items()),
                epochs=epochs,
            )
        )
    return SparseStages(
        epochs=_epochs(config, len(earlier)),
        evaluations=_evaluations(config, len(earlier)),
        stages=tuple(stages),
        dense=layers.dense,
    )


def _graph(prepared: Prepared) -> PruningGraph:
    prune = prepared.config.prune
    return PruningGraph(
        prepared.unpruned, prepared.example_input, ignored=prune.ignored, extra_layers=prune.extra_layers
    )


def _calibration_images(prepared: Prepared) -> int:
    return min(prepared.config.search.images, len(prepared.train))


def _epochs(config: RunConfig, fine_tunes: int) -> dict[str, int]:
    """By phase, of a run with so many fine-tunings."""
    training_phases = _training_phases(config)
    return {
        "train": len(training_phases.get("train", ())),
        "fine-tune": fine_tunes * config.prune.fine_tune_epochs,
        "final": len(training_phases["final"]),
    }


def _evaluations(config: RunConfig, fine_tunes: int) -> int:
    """On the test images, of a run with so many fine-tunings; the last epoch of a training phase is followed by one
    anyway."""
    between = sum(
        config.train.is_tested(plan.epoch) for epochs in _training_phases(config).values() for plan in epochs[:-1]
    )
    before = config.prunes or config.train.pretrained is not None
    return before + fine_tunes + between + 1


def _training_phases(config: RunConfig) -> dict[Phase, tuple[EpochPlan, ...]]:
    """The epochs of the training phases before and after pruning."""
    first = initial_state(config)
    phases: tuple[Phase, ...] = ("train", "final") if first.phase == "train" else ("final",)
    return {phase: next_training_phase(replace(first, phase=phase), config).epochs for phase in phases}


def _drawn_scores(graph: PruningGraph, criterion: str, seed: int) -> dict[str, torch.Tensor]:
    """Any scores in place of those that images would give: other ones than a criterion of weights has."""
    return {
        layer: torch.rand(
            group.filters, generator=torch.Generator().manual_seed(derive_seed(seed, f"dry run, {criterion}, {layer}"))
        )
        for layer, group in graph.layers.items()
    }


def _removed(filters: int, percent: float) -> int:
    """How many of the filters that are left an iteration of PLS takes."""
    return max(1, math.floor(percent / 100 * filters + 0.5))


def _gone_with(
    prepared: Prepared, graph: PruningGraph, layers: tuple[str, ...]
) -> Callable[[float], Mapping[str, float]]:
    """What is gone of FLOPs, parameters and latency (as FLOPs) when `layers` each lost a share of their filters."""
    macs, round_to = prepared.baseline.macs, prepared.config.prune.round_to
    flops = [reachable(graph, macs, max_pruned=share, layers=layers, round_to=round_to) for share in _SHARES]
    parameters = [reachable_parameters(graph, max_pruned=share, layers=layers, round_to=round_to) for share in _SHARES]

    def gone(share: float) -> dict[str, float]:
        of_flops = float(np.interp(share, _SHARES, flops))
        return {
            "FLOPs": of_flops,
            "parameters": float(np.interp(share, _SHARES, parameters)),
            "latency": of_flops,
        }

    return gone


def _gone_after(filters: int, gone: Callable[[float], Mapping[str, float]], prune: PruneConfig) -> list[float]:
    """The share of FLOPs that is gone after each iteration of PLS, until the targets are reached or the iterations used
    up."""
    left = filters
    after: list[float] = []
    while left and not 0 < prune.iterations <= len(after):
        left -= _removed(left, prune.percent)
        shares = gone(1 - left / filters)
        after.append(shares["FLOPs"])
        if all(shares[of] >= share for of, share in prune.targets.items()):
            break
    return after


def _fine_tunes(gone: list[float], prune: PruneConfig) -> int:
    """How many follow iterations after which these shares of FLOPs are gone."""
    fine_tunes, fine_tuned_at = 0, 0.0
    for share in gone if prune.fine_tune_epochs else ():
        if share - fine_tuned_at >= prune.fine_tune_every:
            fine_tunes, fine_tuned_at = fine_tunes + 1, share
    return fine_tunes
