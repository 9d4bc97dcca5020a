"""Operations whose result has its own memory, which nothing else reads."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.nn import functional

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
SUMS = (operator.add, torch.add)
ACTIVATIONS = (
    functional.relu,
    functional.relu6,
    functional.hardtanh,
    functional.hardswish,
    functional.silu,
    functional.leaky_relu,
    functional.elu,
    functional.mish,
)
"""Functions whose result has its own memory unless they are called with `inplace`."""


def is_fresh(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the result of a node that does not work in place has its own memory. False if that is not known."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, (*WEIGHTED, nn.modules.batchnorm._BatchNorm)) or is_activation(module)
    return node.op == "call_function" and (node.target in SUMS or node.target in ACTIVATIONS)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is one of torch's activations that can work in place."""
    return type(module).__module__ == "torch.nn.modules.activation" and hasattr(module, "inplace")
