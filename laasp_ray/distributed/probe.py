"""A short speed measurement on one worker's share of the cluster, for a dry run."""

from __future__ import annotations

from typing import Any

import ray
import torch

from laasp_ray.config import RunConfig
from laasp_ray.distributed.cluster import ResourcePlan, usable_cpus
from laasp_ray.errors import ConfigError
from laasp_ray.models.device import unusable
from laasp_ray.search.precision import computing_in
from laasp_ray.tasks import CLASSIFICATION, Task
from laasp_ray.train.speed import TrainingSpeed, measure_forward, measure_training


def measure(
    network: Any, config: RunConfig, share: ResourcePlan, task: Task = CLASSIFICATION
) -> tuple[TrainingSpeed, float]:
    """The speed of a trainer and the images a second of an evaluation task, measured one after the other.

    `network` is the object reference of the unpruned network. Each is measured alone on its node, with the resources
    that it will have.
    """
    resources = dict(share.trainer_resources)
    gpus = resources.pop("GPU", 0)
    trainer = ray.remote(training_speed).options(num_cpus=resources["CPU"], num_gpus=gpus)
    speed = ray.get(trainer.remote(network, config, share.workers, task))
    return speed, ray.get(ray.remote(forward_speed).options(**share.task_options).remote(network, config))


def training_speed(
    unpruned: torch.nn.Module, config: RunConfig, workers: int, task: Task = CLASSIFICATION
) -> TrainingSpeed:
    """The speed of a trainer. Without a GPU the trainers of a node share its cores; all are assumed to be on
    one node.
    """
    torch.set_num_threads(max(1, usable_cpus() // workers))
    return measure_training(unpruned, config, _device(), workers, task)


def forward_speed(unpruned: torch.nn.Module, config: RunConfig) -> float:
    """The images a second of an evaluation task. Without a GPU it uses one thread."""
    if _device().type == "cpu":
        torch.set_num_threads(1)
    with computing_in(config.search.precision):
        return measure_forward(unpruned, config, _device())


def _device() -> torch.device:
    if ray.get_gpu_ids() and not torch.cuda.is_available():
        raise ConfigError(f"node {ray.util.get_node_ip_address()}: {unusable()}")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
