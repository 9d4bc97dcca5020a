"""A prune without cutting: the layers that read the removed channels are masked, and norms over them.

The layer that makes the channels is never masked, because layers in between would turn zeros into other values
(BatchNorm's shift does). If no other operation takes a statistic over channels, masked readers and norms
(masked_norms.py) give what the pruned network gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from laasp_ray.models.device import on_device
from laasp_ray.pruning.channels import Removal
from laasp_ray.pruning.compensation import Compensation
from laasp_ray.pruning.masked_norms import NORMS, run_norm

Mask = Mapping[str, tuple[int, ...]]
"""Convolution, linear layer or norm over channels -> its masked input channels, rising."""


Masked = Mapping[str, tuple[int, ...] | Compensation]
"""The same, or how the layer makes up for these channels."""


@dataclass(frozen=True)
class CannotMask:
    """In a mask's place: why a prune has none, so that a pruned copy is measured."""

    reason: str


FEW = 0.25
"""For up to this share of a layer's inputs, subtracting their part is faster than running the layer again."""

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def mask_of(removal: Removal) -> Mask | CannotMask:
    """The mask with the same effect as cutting `removal`, or the reason why there is none.

    A LayerNorm or GroupNorm over the channels is masked too. Other statistics over them are not followed.
    """
    for side, channels in removal.items():
        if channels and side.normalises and not side.attributes:
            return CannotMask(f"{side.module or 'the network'} normalises over its channels")
    return {
        side.module: tuple(sorted(channels))
        for side, channels in removal.items()
        if channels and (side.role == "inputs" or side.normalises)
    }


def run_masked(
    module: nn.Module, inputs: torch.Tensor, gone: tuple[int, ...] | Compensation, output: torch.Tensor | None = None
) -> torch.Tensor:
    """The layer's output for `inputs` (n, C, ...) without the channels that are gone. `output` is that with all."""
    if isinstance(gone, Compensation):
        weight, gain = gone.applied(module.get_parameter("weight"))
        bias = gain if module.bias is None else gain + module.get_parameter("bias").detach()
        return _apply(module, inputs, weight, bias)
    if isinstance(module, NORMS):
        return run_norm(module, inputs, gone)
    return run_deaf(module, inputs, gone) if output is None else run_deaf_from(module, inputs, output, gone)


def run_deaf(module: nn.Module, inputs: torch.Tensor, channels: Sequence[int]) -> torch.Tensor:
    """The layer's output for `inputs` (n, C, ...) with these channels set to zero."""
    if not is_plain(module):
        axis = -1 if isinstance(module, nn.Linear) else 1
        return module(inputs.index_fill(axis, on_device(torch.tensor(channels), inputs.device), 0))
    bias = module.get_parameter("bias").detach() if module.bias is not None else None
    return _apply(module, inputs, _deaf_weight(module, channels), bias)


def run_deaf_from(
    module: nn.Module, inputs: torch.Tensor, output: torch.Tensor, channels: Sequence[int]
) -> torch.Tensor:
    """As `run_deaf`, from `output`, the layer's output for all of `inputs`: the part of the channels is subtracted.

    A layer is linear in its inputs, so a few channels cost a small share of the whole layer.
    """
    if not is_plain(module) or getattr(module, "groups", 1) != 1:
        return run_deaf(module, inputs, channels)
    weight = module.get_parameter("weight").detach()
    if len(channels) > FEW * weight.shape[1]:
        return run_deaf(module, inputs, channels)
    axis = -1 if isinstance(module, nn.Linear) else 1
    # Slices are used because indexing is many times slower if channels are last in memory.
    few = torch.cat([inputs.narrow(axis, channel, 1) for channel in channels], axis)
    weight = torch.cat([weight.narrow(1, channel, 1) for channel in channels], 1)
    if few.ndim == 4 and output.is_contiguous(memory_format=torch.channels_last):
        few = few.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
    return _apply(module, few, weight.neg_(), None).add_(output)


def is_bare(module: nn.Module) -> bool:
    """Whether a module does only what its type does: it has no hooks and no forward of its own."""
    return not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is exactly one of torch's layers. A subclass or a parametrised layer is not."""
    return type(module) in _PLAIN and is_bare(module)


def _apply(module: nn.Module, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module._conv_forward(inputs, weight, bias)  # this handles the padding mode
    return nn.functional.linear(inputs, weight, bias)


def _deaf_weight(module: nn.Module, channels: Sequence[int]) -> torch.Tensor:
    weight = module.get_parameter("weight").detach().clone()
    groups = int(getattr(module, "groups", 1))
    if groups == 1:
        return weight.index_fill_(1, on_device(torch.tensor(channels), weight.device), 0)
    rows, width = weight.shape[0] // groups, weight.shape[1]
    for channel in channels:  # each group of filters has its own inputs
        group = channel // width
        weight[group * rows : (group + 1) * rows, channel % width] = 0
    return weight
