"""The section `cluster`: how much of the cluster a run uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from laasp_ray.config.fields import Doc, check, check_types


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The part of the cluster that a run uses. These settings may change when a run is resumed.

    The number of workers at the run's start is the number of parts of a global batch, which decides which images share
    a batch in BatchNorm. It stays; while the cluster has room for fewer workers, each takes several parts.
    One trainer and one evaluation task share each GPU. A trainer takes more than half of it, so two trainers never
    share one.
    """

    workers: Annotated[
        int,
        Doc(
            "Ray Train workers, fixed when a run begins; 0: one per GPU, without GPUs two at most; without GPUs an "
            "autoscaler is asked for a CPU for each"
        ),
    ] = 0
    gpus: Annotated[int, Doc("GPUs that the cluster's autoscaler is asked for; 0: the GPUs that are there")] = 0
    wait_minutes: Annotated[float, Doc("minutes to wait for what an autoscaler is asked for")] = 30.0
    search_workers: Annotated[int, Doc("search workers at most; 0: one per device of the cluster")] = 0
    threads: Annotated[int, Doc("threads of a trainer without a GPU; 0: its share of the cluster's CPUs")] = 0
    trainer_gpu_share: Annotated[float, Doc("what a trainer takes of a GPU, above one half and below 1")] = 0.6
    task_gpu_share: Annotated[float, Doc("what an evaluation task takes of a GPU, at most 1 - trainer_gpu_share")] = 0.4
    worker_failures: Annotated[int, Doc("times that the trainers may be lost without an epoch finished in between")] = 3

    def __post_init__(self) -> None:
        check_types(self, "cluster.")
        check(self.workers >= 0, "cluster.workers", self.workers, "at least 0 (0: as many as fit)")
        check(self.gpus >= 0, "cluster.gpus", self.gpus, "at least 0 (0: those that are there)")
        check(
            self.gpus == 0 or self.workers <= self.gpus,
            "cluster.workers",
            self.workers,
            f"at most cluster.gpus ({self.gpus}), one GPU each",
        )
        check(self.search_workers >= 0, "cluster.search_workers", self.search_workers, "at least 0 (0: one per device)")
        check(self.threads >= 0, "cluster.threads", self.threads, "at least 0 (0: a share of the cluster's CPUs)")
        check(self.wait_minutes >= 0, "cluster.wait_minutes", self.wait_minutes, "at least 0")
        check(
            0.5 < self.trainer_gpu_share < 1,
            "cluster.trainer_gpu_share",
            self.trainer_gpu_share,
            "above one half and below 1",
        )
        check(
            0 < self.task_gpu_share <= 1 - self.trainer_gpu_share + 1e-9,
            "cluster.task_gpu_share",
            self.task_gpu_share,
            "positive and at most 1 - cluster.trainer_gpu_share",
        )
        check(self.worker_failures >= 0, "cluster.worker_failures", self.worker_failures, "at least 0")
