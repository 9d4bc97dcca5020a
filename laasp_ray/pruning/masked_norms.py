"""A normalisation over channels without some of them, as the pruned network computes it.

A LayerNorm or GroupNorm takes its mean and variance over channels, so a masked one must not count those that are gone:
it runs on the channels that are left, with their scales and offsets, and the others become zero.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

NORMS = (nn.LayerNorm, nn.GroupNorm)
_TOLERANCE = 1e-4


def run_norm(module: nn.Module, inputs: torch.Tensor, gone: Sequence[int]) -> torch.Tensor:
    """The output of a norm whose axis is known for `inputs` (n, ...), with zeros in the channels that are gone."""
    axis = norm_axis(module)
    assert axis is not None  # Program.branch_point has made sure
    width, lost = inputs.shape[axis], set(gone)
    kept = torch.tensor([index for index in range(width) if index not in lost], device=inputs.device)
    found = _of_channels(module, kept)(inputs.index_select(axis, kept))
    return torch.zeros_like(inputs, dtype=found.dtype).index_copy_(axis, kept, found)


@torch.no_grad()
def norm_axis(module: nn.Module) -> int | None:
    """The dimension that a norm's channels lie along: the last one, or 1. None if it does more than its type does.

    Libraries derive norms from torch's own that permute their input first, so a type of theirs is tried on noise.
    """
    bare = not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
    if not bare or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1):
        return None
    if type(module) in NORMS:
        return -1 if isinstance(module, nn.LayerNorm) else 1
    return next((axis for axis in (1, -1) if _normalises_along(module, axis)), None)


def _normalises_along(module: nn.Module, axis: int) -> bool:
    weight, bias = cast(Any, module.weight), cast(Any, module.bias)
    like = weight if weight is not None else torch.zeros(())
    noise = torch.randn(2, 2, 3, _channels(module), generator=torch.Generator().manual_seed(0)).to(like)
    try:
        if isinstance(module, nn.GroupNorm):
            noise = noise.movedim(-1, 1)
            wanted = functional.group_norm(noise, module.num_groups, weight, bias, module.eps)
            found = module(noise) if axis == 1 else None
        else:
            wanted = functional.layer_norm(noise, (noise.shape[-1],), weight, bias, cast(Any, module.eps))
            found = module(noise.movedim(-1, axis)).movedim(axis, -1)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return isinstance(found, torch.Tensor) and found.shape == wanted.shape and torch.allclose(
        found, wanted, rtol=0, atol=_TOLERANCE
    )  # fmt: skip


def _channels(module: nn.Module) -> int:
    return module.normalized_shape[0] if isinstance(module, nn.LayerNorm) else cast(Any, module.num_channels)


def _of_channels(module: nn.Module, kept: torch.Tensor) -> nn.Module:
    """The norm of the channels that are kept. It shares all but its scales and offsets with `module`."""
    smaller = copy.copy(module)
    smaller._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach()[kept], requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    if isinstance(smaller, nn.LayerNorm):
        smaller.normalized_shape = (len(kept),)
    else:
        cast(Any, smaller).num_channels = len(kept)
    return smaller
