"""Multiply-accumulates of convolutions and linear layers, counted by fvcore."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from laasp_ray.models.copying import deep_copy

with warnings.catch_warnings():
    # fvcore compiles a loss when it is imported. torch reports that as deprecated, and a user cannot change it.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    from fvcore.nn import FlopCountAnalysis

CONVENTION = "multiply-accumulates of convolutions and linear layers, one input"
_COUNTED_OPERATORS = ("conv", "linear", "addmm", "matmul")


@dataclass(frozen=True)
class Macs:
    """A count of multiply-accumulates, with its convention.

    `per_layer`: convolution or linear layer -> multiply-accumulates over all its calls in one forward pass.
    `weight_shapes`: the same layers -> shape of their weight. `uncounted`: operators in the network that the convention
    leaves out, sorted.
    """

    total: int
    per_layer: Mapping[str, int]
    weight_shapes: Mapping[str, tuple[int, ...]]
    uncounted: tuple[str, ...]
    convention: str = CONVENTION


def count_macs(model: nn.Module, example_input: torch.Tensor) -> Macs:
    """Counts one forward pass of one input. `example_input` has shape (B, ...), and only its first input is used.

    It counts on a copy in eval mode and does not change `model`. The input must be on the model's device.
    """
    probe = deep_copy(model).eval()
    with torch.no_grad():
        analysis = FlopCountAnalysis(probe, example_input[:1]).unsupported_ops_warnings(False)
        analysis = analysis.uncalled_modules_warnings(False).tracer_warnings("none")
        by_module = analysis.by_module_and_operator()
        unsupported = set(analysis.unsupported_ops())
    per_layer: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in probe.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            per_layer[name] = round(sum(by_module[name][operator] for operator in _COUNTED_OPERATORS))
            shapes[name] = tuple(module.weight.shape)
    uncounted = unsupported | (set(by_module[""]) - set(_COUNTED_OPERATORS))
    return Macs(
        total=sum(per_layer.values()), per_layer=per_layer, weight_shapes=shapes, uncounted=tuple(sorted(uncounted))
    )
