"""Pools a filter's outputs into a few numbers."""

from __future__ import annotations

import torch
from torch.nn import functional

from laasp_ray.config import POOLING
from laasp_ray.errors import ConfigError


def pooled(output: torch.Tensor, pooling: str) -> torch.Tensor:
    """Reduces a filter's outputs to one number for each window: (B, N, ...) -> (B, N, windows).

    Windows are adjacent and start at the corner; those at the far edges may be smaller. Raises ConfigError for windows
    in outputs that are not images.
    """
    match = POOLING.fullmatch(pooling)
    assert match is not None  # the config checks it
    kind, *window = match.groups()
    if output.ndim == 2:
        return output.unsqueeze(2)
    if window[0] is None:
        flat = output.flatten(2)
        return flat.amax(dim=2, keepdim=True) if kind == "max" else flat.mean(dim=2, keepdim=True)
    if output.ndim != 4:
        raise ConfigError(
            f"prune.pooling {pooling!r} has windows of a picture, but a layer's output has shape "
            f"{tuple(output.shape)}: use 'max' or 'avg'"
        )
    size = [min(int(wanted), have) for wanted, have in zip(window, output.shape[2:], strict=True)]
    pool = functional.max_pool2d if kind == "max" else functional.avg_pool2d
    return pool(output, size, stride=size, ceil_mode=True).flatten(2)
