"""Channels last: the memory format in which convolutions on images are faster, for networks that can run in it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from laasp_ray.models.copying import deep_copy


def to_channels_last(model: nn.Module) -> nn.Module:
    """Converts the 4-D tensors of `model` to channels last, in place. torch's own method fails for a network with a
    Conv3d.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


def to_fast_format(model: nn.Module, image: torch.Tensor) -> nn.Module:
    """Converts `model` to channels last, in place, if it can process `image` (1, C, H, W) in that format.

    A network with `x.view(len(x), -1)` after a convolution cannot.
    """
    probe = to_channels_last(deep_copy(model)).eval()
    if image.ndim != 4:
        return model
    try:
        with torch.no_grad():
            probe(image.contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        if "view" not in str(error):
            raise
        return model
    return to_channels_last(model)


def in_format_of(model: nn.Module, images: Any) -> Any:
    """Converts images (B, C, H, W) to channels last if the weights of `model` are; else returns them unchanged."""
    if (
        isinstance(images, torch.Tensor)
        and images.ndim == 4
        and any(_is_channels_last(parameter) for parameter in model.parameters())
    ):
        return images.contiguous(memory_format=torch.channels_last)
    return images


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
