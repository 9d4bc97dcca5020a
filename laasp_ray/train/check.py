"""Checks before a run that a network can be trained, both unpruned and pruned. Other checks cover eval mode only."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

from torch import nn

from laasp_ray.config import TrainConfig
from laasp_ray.errors import ConfigError, PruningError
from laasp_ray.models.copying import deep_copy
from laasp_ray.models.suitable import shown
from laasp_ray.pruning.channels import plan_of
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.joint import joint_removal
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.pruning.verify import clone_sharing_parameters
from laasp_ray.tasks import CLASSIFICATION, Task
from laasp_ray.train.trial import try_step

logger = logging.getLogger(__name__)

_CHANNELS = 3
"""The number of channels that every loader delivers. Images without colour are converted to colour."""
_SHOWN = 3


def check_training(
    model: nn.Module,
    shape: Sequence[int],
    config: TrainConfig,
    graph: PruningGraph | None,
    task: Task = CLASSIFICATION,
) -> None:
    """Raises ConfigError if a training step fails, for `model` or for `model` with every layer of `graph` slightly
    pruned.

    `shape` (C, H, W) is the shape of a loaded image. Works on copies and keeps the random state.
    """
    if shape[0] != _CHANNELS and task.data is None:
        raise ConfigError(
            f"model.input_shape is {tuple(shape)}, but images are loaded with {_CHANNELS} channels, grey ones too: "
            f"give the network {_CHANNELS} input channels and set "
            f"model.input_shape to ({_CHANNELS}, {shape[1]}, {shape[2]})"
        )
    tried = try_step(deep_copy(model), shape, config, task)
    if tried.fault:
        raise ConfigError(f"the network cannot be trained: {tried.fault}")
    if graph is None or not graph.layers:
        return
    fault = _try_cut(model, graph, list(graph.layers), shape, config, task)
    if not fault:
        return
    singly = (layer for layer in graph.layers if _try_cut(model, graph, [layer], shape, config, task))
    guilty = list(itertools.islice(singly, _SHOWN + 1))
    layers = shown(guilty or list(graph.layers), _SHOWN)
    raise ConfigError(
        f"the network cannot be trained any more once layers are pruned ({layers}): {fault}. What only training mode "
        "runs is not cut along: name those layers in prune.ignored, or run the same modules in eval mode"
    )


def _try_cut(
    model: nn.Module, graph: PruningGraph, layers: Sequence[str], shape: Sequence[int], config: TrainConfig, task: Task
) -> str:
    cut = clone_sharing_parameters(model)
    try:
        apply_plan(cut, small_plan(graph, layers))
    except PruningError as error:  # the layers were tried alone before; a conflict between them is no fault of training
        logger.debug("no step of training was tried on the network cut in %s: %s", ", ".join(layers), error)
        return ""
    return try_step(
        deep_copy(cut), shape, config, task
    ).fault  # a step changes weights, which the pruned network shares


def small_plan(graph: PruningGraph, layers: Sequence[str]) -> Plan:
    """Prunes one filter of every block of each of `layers`, with what is coupled to it. Of tied layers only the first
    is listed.
    """
    chosen: dict[str, range] = {}
    taken: set[str] = set()
    for layer in layers:
        group = graph.layers[layer]
        if layer in taken:
            continue
        chosen[layer] = range(0, group.filters, group.filters // group.blocks)
        taken |= {side.module for side in graph.removal(layer, chosen[layer]) if side.role == "filters"}
    return plan_of(joint_removal(graph, chosen))
