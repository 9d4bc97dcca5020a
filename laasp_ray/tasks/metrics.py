"""Metrics of the user's own: sums over examples that are added over batches and ranks, and one number from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class Metric(Protocol):
    """One number from an evaluation. `higher_is_better` says which of two epochs is better by it."""

    @property
    def higher_is_better(self) -> bool: ...

    @property
    def width(self) -> int:
        """The number of sums."""

    def sums(self, outputs: Any, targets: Any) -> torch.Tensor:
        """The sums (width,) of a batch. They are added over batches and ranks in float64, so they must not depend on
        which examples share a batch.
        """

    def value(self, sums: torch.Tensor) -> float:
        """The number, from the float64 sums (width,) over all examples, on the CPU."""


@dataclass(frozen=True)
class Mean:
    """The mean over examples of `function`(outputs, targets), one value (n,) for each."""

    function: Callable[[Any, Any], torch.Tensor]
    higher_is_better: bool = True

    @property
    def width(self) -> int:
        return 2

    def sums(self, outputs: Any, targets: Any) -> torch.Tensor:
        values = self.function(outputs, targets)
        if not isinstance(values, torch.Tensor) or values.ndim != 1:
            given = f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
            raise ValueError(f"a function as metric gave {given}, must give a tensor (n,), a value for each example")
        return torch.stack([values.double().sum(), values.new_full((), len(values), dtype=torch.float64)])

    def value(self, sums: torch.Tensor) -> float:
        return float(sums[0] / sums[1])


@dataclass(frozen=True)
class TopK:
    """The share of images whose label (n,) is among the `k` highest outputs (n, classes)."""

    k: int = 1
    higher_is_better: bool = True

    @property
    def width(self) -> int:
        return 2

    def sums(self, outputs: Any, targets: Any) -> torch.Tensor:
        best = outputs.topk(min(self.k, outputs.shape[1]), dim=1).indices == targets[:, None]
        return torch.stack([best.sum().double(), best.new_full((), len(best), dtype=torch.float64)])

    def value(self, sums: torch.Tensor) -> float:
        return float(sums[0] / sums[1])
