"""What a race leaves to the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class RaceMemory:
    """The losses of a race's choice on all images (n,), in their order, and whether they are of a fast precision.

    After that prune they are about those of the network without a prune, which the next race then need not measure on
    all images. Any losses would leave its estimates unbiased (search/stratified.py), but those of a network that was
    trained since would make it longer. A run forgets them then.
    """

    losses: np.ndarray | None = None
    fast: bool = False

    def tensors(self) -> dict[str, torch.Tensor]:
        """It as the run stores it: nothing if there are no losses."""
        if self.losses is None:
            return {}
        return {"fast" if self.fast else "full": torch.from_numpy(self.losses.copy())}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `tensors` gave."""
        self.fast = "fast" in tensors
        self.losses = next((tensor.numpy() for tensor in tensors.values()), None)

    def forget(self) -> None:
        self.losses = None

    def of(self, images: int, fast: bool) -> np.ndarray | None:
        """The losses, if they are of so many images and of this precision."""
        usable = self.losses is not None and len(self.losses) == images and self.fast == fast
        return self.losses if usable and self.losses is not None and np.isfinite(self.losses).all() else None
