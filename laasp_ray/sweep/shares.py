"""How the runs of a sweep that are under way at a time share a cluster, so that none waits for another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from laasp_ray.config import ClusterConfig
from laasp_ray.errors import ConfigError


@dataclass(frozen=True)
class Shares:
    """`slots` runs at a time, each with the section `cluster`; one that nothing runs beside has the section `alone`."""

    slots: int
    cluster: ClusterConfig
    alone: ClusterConfig


def share_out(
    resources: Mapping[str, float],
    cluster: ClusterConfig,
    runs: int,
    concurrent: int | None = None,
    *,
    all_search: bool = False,
) -> Shares:
    """Shares the cluster's `resources` ('CPU', 'GPU') between runs, of which there are at most `runs`.

    A run has `cluster.workers` trainers, or as many as a run of its own would have. As many runs as fit then are under
    way at a time, or `concurrent` of them. With GPUs, each is one trainer's, and a run searches on those that the other
    runs' trainers do not need. Without, trainers share the CPUs by their threads, and the search has all: it and the
    trainers of other runs slow each other down, but none waits. If `all_search`, each run has its share of them.

    Raises ConfigError if `concurrent` runs do not fit, naming what would.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    devices, kind = (gpus, "GPUs") if gpus else (cpus, "CPUs and no GPU")
    workers = cluster.workers or (min(gpus, cluster.gpus or gpus) if gpus else min(2, cpus))
    fits = max(1, devices // max(1, workers))
    if concurrent is not None and not 1 <= concurrent <= fits:
        raise ConfigError(
            f"--concurrent {concurrent}: runs of {workers} workers each, where the cluster has {devices} {kind}; at "
            f"most {fits} fit at a time: lower it, or lower cluster.workers (--workers)"
        )
    slots = min(concurrent or fits, runs)
    ours = replace(cluster, workers=workers, gpus=0)
    if gpus:
        others = workers * (slots - 1)
        return Shares(slots, replace(ours, search_workers=cluster.search_workers or (others and gpus - others)), ours)
    ours = replace(ours, threads=cluster.threads or max(1, cpus // (workers * slots)))
    searching = cluster.search_workers or (max(1, cpus // slots) if all_search and slots > 1 else 0)
    return Shares(slots, replace(ours, search_workers=searching), ours)
