"""Divides a cluster between trainers and evaluation tasks, so that neither waits for the other.

Each GPU has room for one trainer (0.6 by default) and one evaluation task (0.4). Two trainers never share a GPU, which
NCCL would refuse. On CPUs trainers hold a small share, because they sleep during the search; tasks run only then.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from laasp_ray.config import ClusterConfig
from laasp_ray.distributed.address import check_address
from laasp_ray.errors import ConfigError

TRAINER_CPUS = 0.05
TASK_CPUS = 0.9

LOCAL_ENVIRONMENT = {
    # Ray ends idle worker processes after a second; processes that measure losses would import torch again in every
    # iteration.
    "RAY_idle_worker_killing_time_threshold_ms": "3600000",
}


@dataclass(frozen=True)
class ResourcePlan:
    """The resources that a run uses, in Ray's terms, per worker or task.

    `workers` is the number of trainers that the run wants. It has fewer while there is less room. `trainer_threads` is
    the number of threads of a trainer without a GPU. It stays when trainers are lost, because sums depend on it.
    `search_workers` is the most that the search may have; 0 is one per device.
    """

    workers: int
    gpus: int
    trainer_resources: Mapping[str, float]
    task_options: Mapping[str, Any]
    trainer_threads: int | None = None
    search_workers: int = 0


def plan_resources(
    resources: Mapping[str, float], config: ClusterConfig, batch_parts: int | None = None
) -> ResourcePlan:
    """Plans a run's resources. `resources` are the cluster's totals ('CPU', 'GPU').

    A run that is resumed has the `batch_parts` of its start, and wants as many workers. Raises ConfigError if a new run
    asks for more workers than the cluster can hold.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    room = gpus or cpus
    if room == 0:
        raise ConfigError(
            "the Ray cluster has no CPU and no GPU: start it with some, e.g. ray start --head --num-cpus=2, or set "
            "cluster.gpus or cluster.workers, for which its autoscaler is asked, if it has one"
        )
    if config.workers > room and batch_parts is None:
        kind = "GPUs, one for each worker" if gpus else "CPUs and no GPU, one for each worker"
        raise ConfigError(
            f"cluster.workers is {config.workers}, but the cluster has {room} {kind}: ask for at most {room}"
        )
    if gpus:
        return ResourcePlan(
            workers=batch_parts or config.workers or min(gpus, config.gpus or gpus),
            gpus=gpus,
            trainer_resources={"CPU": TRAINER_CPUS, "GPU": config.trainer_gpu_share},
            task_options={"num_cpus": TRAINER_CPUS, "num_gpus": config.task_gpu_share},
            search_workers=config.search_workers,
        )
    workers = batch_parts or config.workers or min(2, cpus)
    return ResourcePlan(
        workers=workers,
        gpus=0,
        trainer_threads=config.threads or max(1, cpus // workers),
        trainer_resources={"CPU": TRAINER_CPUS},
        task_options={"num_cpus": TASK_CPUS},
        search_workers=config.search_workers,
    )


def usable_cpus() -> int:
    """The number of CPUs that this process may use. A container or CPU affinity may allow fewer than the
    machine has.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def connected(address: str | None = None) -> Iterator[Mapping[str, float]]:
    """Joins a cluster, or starts one on this machine until the context ends. Yields the cluster's resources.

    In a submitted job Ray sets RAY_ADDRESS, and the run joins that cluster. A cluster that only happens to run on this
    machine is joined only if `address` is 'auto' or its address. A session that the caller has opened is used and left
    open. The caller's signal handlers are kept. Raises ConfigError if no cluster answers or none can be started.
    """
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    address = check_address(address)
    if address == "local":
        os.environ.update({key: os.environ.get(key, value) for key, value in LOCAL_ENVIRONMENT.items()})
    try:
        # The number of CPUs is left to Ray, because it may not be given when a cluster is joined.
        with _callers_signals(), _without_lines_on_tokens():
            ray.init(
                address=address, log_to_driver=False, **({"include_dashboard": False} if address == "local" else {})
            )
    except Exception as error:  # Ray raises even `Exception` itself, for processes that do not come up in a minute
        ray.shutdown()
        raise ConfigError(_refused(address, error)) from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _refused(address: str, error: Exception) -> str:
    """What to do about an error of ray.init. The head is known to answer."""
    text = str(error)
    if "ersion mismatch" in text:
        return f"the Ray cluster at {address!r} has other versions; install the same on both sides: {text}"
    if isinstance(error, ConnectionError) and address != "local":
        return (
            f"the Ray cluster at {address!r} answers but does not let this driver in: check that RAY_AUTH_MODE=token "
            f"is set and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH give the cluster's token ({text})"
        )
    return f"no Ray cluster could be reached at {address!r}: {text}"


@contextmanager
def _callers_signals() -> Iterator[None]:
    """Restores the caller's signal handlers. Ray replaces them, and its C++ core prints the native stack on SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, handler)


@contextmanager
def _without_lines_on_tokens() -> Iterator[None]:
    """Hides Ray's message about authentication tokens, which it logs whenever a cluster starts."""
    token_log = logging.getLogger("ray._private.authentication.authentication_token_setup")
    level = token_log.level
    token_log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        token_log.setLevel(level)
