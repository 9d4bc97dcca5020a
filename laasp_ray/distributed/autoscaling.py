"""Asks a cluster's autoscaler for the GPUs or CPUs of a run, and waits for them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import ray
from ray.autoscaler.sdk import request_resources

from laasp_ray.config import ClusterConfig
from laasp_ray.distributed.waiting import Waiting
from laasp_ray.errors import ConfigError

logger = logging.getLogger(__name__)

LOOK_S = 2.0
NEVER_S = 30.0
"""A request that the autoscaler has called impossible for so many seconds is given up."""


@dataclass(frozen=True)
class _Wish:
    """The number of devices that a run wants. `kind` is Ray's name, `key` the setting that asks for them."""

    kind: str
    wanted: int
    key: str

    def there(self, resources: Mapping[str, float]) -> int:
        return int(resources.get(self.kind, 0))

    def remedy(self, there: int) -> str:
        if there:
            return f"set {self.key}={there}"
        return "add nodes with GPUs, or set cluster.gpus=0" if self.kind == "GPU" else "add nodes with CPUs"


@contextmanager
def with_devices(
    resources: Mapping[str, float], config: ClusterConfig, batch_parts: int | None = None, *, grows: bool
) -> Iterator[Mapping[str, float]]:
    """Asks for the run's devices while the context lasts, and yields the cluster's resources once they are there.

    These are `cluster.gpus` GPUs; without them, a CPU for each of `cluster.workers`, if the cluster has no GPU and an
    autoscaler. A run that is resumed, with its `batch_parts`, begins with fewer CPUs, but not without any. `resources`
    are those of now. `grows` is False for a cluster of this process, which no autoscaler serves.

    Raises ConfigError if they have not come after `cluster.wait_minutes`, or if the autoscaler says that they never
    will, naming what is there. The request ends with the context, so that the autoscaler may end the nodes. After
    SIGKILL it stays until another run ends its own.
    """
    wish = _wish(resources, config, grows=grows)
    if wish is None:
        yield resources
        return
    enough = 1 if batch_parts is not None and wish.kind == "CPU" else wish.wanted
    request_resources(bundles=[{wish.kind: 1}] * wish.wanted)
    try:
        _wait(wish, enough, 60 * config.wait_minutes)
        yield ray.cluster_resources()
    finally:
        try:
            request_resources(bundles=[])
        except Exception as error:  # the cluster may be gone; the run's own error counts
            logger.warning("the autoscaler could not be asked to let the %ss go: %s", wish.kind, error)


def _wish(resources: Mapping[str, float], config: ClusterConfig, *, grows: bool) -> _Wish | None:
    """What to ask for, or None. More CPUs than there are, on a cluster that does not grow, are refused elsewhere."""
    gpus = int(resources.get("GPU", 0))
    if config.gpus:
        if gpus < config.gpus and not grows:
            raise ConfigError(
                f"cluster.gpus is {config.gpus}, but this machine has {gpus}: lower it, or give the address of a "
                "cluster with --ray-address"
            )
        return _Wish("GPU", config.gpus, "cluster.gpus")
    if gpus or not grows or not config.workers or not has_autoscaler():
        return None
    return _Wish("CPU", config.workers, "cluster.workers")


def has_autoscaler() -> bool:
    """Whether an autoscaler serves the cluster of this session, and not only the reporter that every head starts."""
    from ray.experimental.internal_kv import _internal_kv_get

    if _state_of_autoscaler() is not None:
        return True
    report = _internal_kv_get(b"__autoscaling_status")  # of the autoscaler before Ray's second one
    types = json.loads(report).get("autoscaler_report", {}).get("node_type_mapping") if report else None
    return any(kind != f"node_{node}" for node, kind in (types or {}).items())  # the reporter makes such names


def _state_of_autoscaler() -> object | None:
    """What Ray's second autoscaler says of itself; None where there is none."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    with suppress(Exception):  # a head that is too busy, or another Ray; nothing is known then
        reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=5))
    state = reply.autoscaling_state
    return state if state.autoscaler_state_version else None


def _is_impossible() -> bool:
    """Whether the autoscaler says that it can never have what was asked for. The first one never says so."""
    return bool(getattr(_state_of_autoscaler(), "infeasible_cluster_resource_constraints", ()))


def _wait(wish: _Wish, enough: int, patience_s: float) -> None:
    waiting, impossible, first = Waiting(), Waiting(), True
    while (there := wish.there(ray.cluster_resources())) < enough:
        if not _is_impossible():
            impossible.restart()
        elif impossible.seconds >= NEVER_S:
            raise ConfigError(
                f"{wish.key} is {wish.wanted}, but the cluster's autoscaler can never have so many {wish.kind}s (there "
                f"are {there} now): lower it, or raise max_workers (KubeRay: maxReplicas) of the cluster"
            )
        if waiting.seconds >= patience_s:
            raise ConfigError(
                f"{wish.key} is {wish.wanted}, and after {patience_s / 60:g} min the cluster has {there} {wish.kind}s "
                f"on {sum(node['Alive'] for node in ray.nodes())} nodes: {wish.remedy(there)} to use what is there, or "
                "raise cluster.wait_minutes"
            )
        if first or waiting.has_to_be_said():
            first = False
            logger.warning(
                "the cluster has %d of %d %ss; its autoscaler is asked for the others (for %.0f s now)",
                there,
                wish.wanted,
                wish.kind,
                waiting.seconds,
            )
        time.sleep(LOOK_S)
