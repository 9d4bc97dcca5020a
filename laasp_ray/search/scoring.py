"""Scores of filters by criteria of weights, kept while a layer's weights stay as they are.

A prune changes a few layers of many, so most scores of an iteration are those of the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from laasp_ray import criteria

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> the type to compare its bits in."""


@dataclass(frozen=True)
class _Known:
    weights: torch.Tensor
    groups: int
    scores: dict[str, torch.Tensor] = field(default_factory=dict)


class ScoreMemory:
    """The scores of each layer's filters by its last weights, of which it keeps a copy.

    A criterion of weights is a pure function, so equal weights have equal scores.
    """

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def scores(self, names: Sequence[str], layer: str, module: nn.Module) -> dict[str, torch.Tensor]:
        """Criterion -> scores (N,) of the filters of `module`, which is `layer`. Raises the errors of
        `criteria.scores`.
        """
        weights = module.get_parameter("weight").detach()
        groups = int(getattr(module, "groups", 1))
        known = self._known.get(layer)
        if known is None or known.groups != groups or not _same_bits(known.weights, weights):
            known = self._known[layer] = _Known(weights.clone(), groups)
        for name in names:
            if name not in known.scores:
                known.scores[name] = criteria.scores(name, module)
        return {name: known.scores[name] for name in names}


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal to the last bit. NaN equals itself, and 0 is not -0."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    bits = _BITS[one.element_size()]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))
