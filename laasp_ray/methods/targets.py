"""Progress towards the targets of a run (config.TARGETS) other than FLOPs. A decision has the reduction of FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from laasp_ray.config import FilterPruneConfig, RunConfig
from laasp_ray.cost.latency import Latency, measure_pair
from laasp_ray.errors import ConfigError
from laasp_ray.models.device import this_device
from laasp_ray.pruning.network import NetworkState, rebuild
from laasp_ray.pruning.plan import Plan, parameters_after


@dataclass(frozen=True)
class Reached:
    """`shares` is the reduction for each target; `latency` is that of the unpruned and of the pruned network."""

    shares: Mapping[str, float]
    latency: tuple[Latency, Latency] | None = None


def measure_targets(unpruned: nn.Module, network: NetworkState, config: RunConfig) -> Reached:
    """Measures the quantities that have a target.

    Parameters are counted. Latency is measured in this process, on its GPU if it has one, with `prune.latency_batch`
    images. Passes of the two networks alternate, and the medians are compared. The result varies between measurements.
    """
    shares: dict[str, float] = {}
    latency = None
    targets = config.prune.targets
    if "parameters" in targets:
        shapes = {name: tuple(parameter.shape) for name, parameter in unpruned.named_parameters()}
        shares["parameters"] = 1 - parameters_after(shapes, network.plan) / parameters_after(shapes, Plan.empty())
    if "latency" in targets:
        latency = measure_latency(unpruned, rebuild(unpruned, network), config)
        shares["latency"] = 1 - latency[1].median_ms / latency[0].median_ms
    return Reached(shares, latency)


def check_latency_batch(unpruned: nn.Module, config: RunConfig) -> None:
    """Raises ConfigError if a batch of `prune.latency_batch` images does not fit into the device's memory."""
    try:
        measure_latency(unpruned, unpruned, config, repeats=2)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"prune.latency_batch is {_batch(config)}, which does not fit into the memory of the driver's "
            f"{torch.cuda.get_device_name()}: lower it"
        ) from error


def measure_latency(first: nn.Module, second: nn.Module, config: RunConfig, **options: int) -> tuple[Latency, Latency]:
    """The latencies of two networks, by turns, in this process, on its GPU if it has one; `options` of measure_pair."""
    device = this_device()
    try:
        return measure_pair(
            first,
            second,
            config.model.input_shape,
            batch_size=_batch(config),
            device=device.type,
            **options,
        )
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # trainers and tasks share this GPU, and the driver keeps its process


def _batch(config: RunConfig) -> int:
    assert isinstance(config.prune, FilterPruneConfig)  # only these runs have targets
    return config.prune.latency_batch
