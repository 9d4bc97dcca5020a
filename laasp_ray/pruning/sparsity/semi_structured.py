"""Runs 2:4 sparse layers on NVIDIA's sparse tensor cores with torch's semi-structured tensors, for inference only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.utils import _pair

from laasp_ray.errors import PruningError
from laasp_ray.pruning.sparsity.groups import GroupRule, satisfies

TWO_OF_FOUR = GroupRule(4, 2)
MIN_CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16)
MULTIPLES = (32, 64)
"""The numbers that rows and columns must be multiples of: the stricter of torch's two backends, in 16 bits."""


@dataclass(frozen=True)
class Conversion:
    """`converted`: the layers that now run sparse, in network order. `left`: the other layers, with the reason."""

    converted: tuple[str, ...]
    left: Mapping[str, str]


class SparsePointwise(nn.Module):
    """A 1x1 convolution as a linear layer over the pixels: (B, C, H, W) to (B, N, H', W'), channels last."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.stride = _pair(convolution.stride)
        self.weight = nn.Parameter(convolution.weight.detach().flatten(1).contiguous(), requires_grad=False)
        self.bias = convolution.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        out = nn.functional.linear(pixels.reshape(-1, pixels.shape[-1]), self.weight, self.bias)
        return out.view(*pixels.shape[:-1], -1).permute(0, 3, 1, 2)


def to_semi_structured(model: nn.Module) -> Conversion:
    """Makes the 2:4 sparse linear layers and 1x1 convolutions of `model` run sparse, in place.

    `model` is on a CUDA device of compute capability 8.0 or more, in float16 or bfloat16. Afterwards it can neither be
    trained nor saved. Raises PruningError for another device or dtype.
    """
    first = next(model.parameters())
    if not first.is_cuda or torch.cuda.get_device_capability(first.device) < MIN_CAPABILITY:
        raise PruningError(
            f"the network is on {first.device}: 2:4 kernels need a CUDA device of compute capability "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or more"
        )
    if first.dtype not in DTYPES:
        raise PruningError(f"the network is in {first.dtype}, 2:4 kernels need float16 or bfloat16: call .half() first")
    converted, left = [], {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        reason = why_not(module)
        if reason:
            left[name] = reason
            continue
        target = SparsePointwise(module) if isinstance(module, nn.Conv2d) else module
        dense = target.weight.detach().contiguous()
        target.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(dense), requires_grad=False)
        if target is not module:
            model.set_submodule(name, target)
        converted.append(name)
    return Conversion(tuple(converted), left)


def why_not(module: nn.Conv2d | nn.Linear) -> str:
    """The reason why a layer cannot run with the 2:4 kernels; empty if it can."""
    if isinstance(module, nn.Conv2d):
        if module.kernel_size != (1, 1) or (module.padding != "valid" and any(_pair(module.padding))):
            return "no 1x1 convolution without padding"
        if module.groups != 1:
            return "grouped convolution"
    rows, columns = module.weight.shape[:2]
    if rows % MULTIPLES[0] or columns % MULTIPLES[1]:
        return f"{rows} x {columns} weights, no multiples of {MULTIPLES[0]} and {MULTIPLES[1]}"
    return "" if satisfies(module.weight.detach(), TWO_OF_FOUR) else "not 2:4 sparse"
