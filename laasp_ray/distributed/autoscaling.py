"""Asks a cluster's autoscaler for the GPUs of a run, and waits for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
from ray.autoscaler.sdk import request_resources

from laasp_ray.config import ClusterConfig
from laasp_ray.distributed.waiting import Waiting
from laasp_ray.errors import ConfigError

logger = logging.getLogger(__name__)

LOOK_S = 2.0


@contextmanager
def with_gpus(resources: Mapping[str, float], config: ClusterConfig, *, grows: bool) -> Iterator[Mapping[str, float]]:
    """Asks for `cluster.gpus` GPUs while the context lasts, and yields the cluster's resources once they are there.

    `resources` are those of now. `grows` is False for a cluster of this process, which no autoscaler serves. Raises
    ConfigError if they have not come after `cluster.wait_minutes`, naming what is there. The request ends with the
    context, so that the autoscaler may end the nodes. After SIGKILL it stays until another run ends its own.
    """
    wanted = config.gpus
    if wanted == 0:
        yield resources
        return
    if _gpus(resources) < wanted and not grows:
        raise ConfigError(
            f"cluster.gpus is {wanted}, but this machine has {_gpus(resources)}: lower it, or give the address of a "
            "cluster with --ray-address"
        )
    request_resources(bundles=[{"GPU": 1}] * wanted)
    try:
        _wait(wanted, 60 * config.wait_minutes)
        yield ray.cluster_resources()
    finally:
        request_resources(bundles=[])


def _wait(wanted: int, patience_s: float) -> None:
    waiting, first = Waiting(), True
    while (there := _gpus(ray.cluster_resources())) < wanted:
        if waiting.seconds >= patience_s:
            fits = f"set cluster.gpus={there}" if there else "add nodes with GPUs, or set cluster.gpus=0"
            raise ConfigError(
                f"cluster.gpus is {wanted}, and after {patience_s / 60:g} min the cluster has {there} on "
                f"{sum(node['Alive'] for node in ray.nodes())} nodes: {fits} to use what is there, or raise "
                "cluster.wait_minutes"
            )
        if first or waiting.has_to_be_said():
            first = False
            logger.warning(
                "the cluster has %d of %d GPUs; its autoscaler is asked for the others (for %.0f s now)",
                there,
                wanted,
                waiting.seconds,
            )
        time.sleep(LOOK_S)


def _gpus(resources: Mapping[str, float]) -> int:
    return int(resources.get("GPU", 0))
