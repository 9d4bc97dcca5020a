"""Makes a network distributed: torch's DistributedDataParallel over the ranks of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from laasp_ray.config import TrainConfig
from laasp_ray.tasks import CLASSIFICATION, Task
from laasp_ray.tasks.own import LossModule
from laasp_ray.train.trial import unused_parameters


def distributed(model: nn.Module, shape: Sequence[int], config: TrainConfig, task: Task = CLASSIFICATION) -> nn.Module:
    """`model`, wrapped in DDP if there are other ranks. `shape` (C, H, W) is the shape of its images.
    `model` may be the network with its loss (tasks/own.py).

    A parameter without a gradient in training (of a head that only eval mode uses, for example) would make the second
    step hang or fail. DDP can search for such parameters in every step, which costs time. This option is used only if a
    trial step on each rank finds such a parameter.
    """
    if dist.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    network = model.model if isinstance(model, LossModule) else model
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, unused_parameters(network, shape, config, task))
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # the ranks agree on them once an epoch (train/loop.py)
        find_unused_parameters=any(everyone),
    )
