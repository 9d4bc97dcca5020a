"""Copies of networks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


def deep_copy(model: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
    """Copies a network, including tensors that it keeps from its last forward pass.

    torch alone cannot copy a tensor with a history. `memo` is as for copy.deepcopy.
    """
    known: dict[int, object] = {} if memo is None else memo
    for module in model.modules():
        for tensor in _tensors_in(vars(module), depth=3):
            if not tensor.is_leaf and id(tensor) not in known:
                known[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, known)


def _tensors_in(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """The tensors in a value, and in nested containers down to `depth`."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple | set) and depth:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item, depth - 1)
