"""A network made distributed: torch's DistributedDataParallel over the ranks of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from laasp_ray.config import TrainConfig
from laasp_ray.train.trial import unused_parameters


def distributed(model: nn.Module, shape: Sequence[int], config: TrainConfig) -> nn.Module:
    """`model`, wrapped if there are other ranks; `shape` (C, H, W) is that of its images.

    A parameter that training gives no gradient (a head of eval mode, say) would hang or end the second step, unless
    DDP is set to search for those in every step, which costs time: only where a step of each rank found one.
    """
    if dist.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, unused_parameters(model, shape, config))
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=any(everyone),
    )
