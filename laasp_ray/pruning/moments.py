"""Second moments of a layer's inputs, inverted: what one input tells about the others.

One inverse serves all prunes of the layer: a block of it has the best linear guess of the inputs in the block from all
the others. Without some inputs the inverse follows from the one before.

Source: Hassibi, Stork, Optimal Brain Surgeon, NeurIPS 1993; Frantar, Singh, Alistarh, Optimal Brain Compression,
NeurIPS 2022.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from laasp_ray.errors import SearchError
from laasp_ray.pruning.compensation import Compensation, LostInputs
from laasp_ray.pruning.readers import Reader

RIDGE = 1e-3
"""What is added to the moments' diagonal, as a share of its mean: differences below it do not count."""
GROWTH, MOST_RIDGE = 10.0, 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gram:
    """Sums over patches: `total` float64 (groups, inputs + 1, inputs + 1), the last input being 1."""

    total: torch.Tensor

    @property
    def patches(self) -> int:
        return int(self.total[0, -1, -1])

    def plus(self, other: Gram) -> Gram:
        return Gram(self.total + other.total)


@dataclass(frozen=True)
class Moments:
    """`inverse` float64 (inputs + 1, inputs + 1) of each group's mean of u u', u being its inputs and a 1 at the end,
    with a ridge on all but the constant.
    """

    inverse: tuple[torch.Tensor, ...]

    def without(self, lost: Sequence[Sequence[int]]) -> Moments:
        """The moments of the inputs that are left without `lost` ones of each group."""
        return Moments(tuple(_without(inverse, inputs) for inverse, inputs in zip(self.inverse, lost, strict=True)))

    def compensation(self, reader: Reader, lost: Sequence[Sequence[int]]) -> Compensation:
        """How the reader makes up for `lost` inputs (rising) of each group."""
        pairs = zip(self.inverse, lost, strict=True)
        groups = tuple(LostInputs(tuple(inputs), _guess(inverse, inputs)) for inverse, inputs in pairs)
        return Compensation(groups, reader.sharing)


def inverted(gram: Gram, layer: str) -> Moments:
    """The moments of `layer`. Raises SearchError if a sum is not finite.

    With fewer patches than inputs, or where the moments cannot be inverted, the ridge grows. The second is logged; the
    first concerns many layers at once (`has_few_patches`).
    """
    if not bool(gram.total.isfinite().all()):
        raise SearchError(
            f"the inputs of {layer} are not finite: the network's weights have probably diverged; lower "
            "train.learning_rate or start from an earlier checkpoint"
        )
    patches, inputs = gram.patches, gram.total.shape[-1] - 1
    ridge = RIDGE
    if has_few_patches(gram):
        ridge *= GROWTH
        logger.debug("%s has %d inputs and %d patches of them: the ridge is %g", layer, inputs, patches, ridge)
    return Moments(tuple(_inverse(total / max(1, patches), ridge, layer) for total in gram.total))


def has_few_patches(gram: Gram) -> bool:
    """Whether there are fewer patches than inputs, so that some inputs follow from others by chance."""
    return gram.patches < gram.total.shape[-1] - 1


def _inverse(moments: torch.Tensor, ridge: float, layer: str) -> torch.Tensor:
    diagonal = moments.diagonal()[:-1]
    mean = float(diagonal.mean()) or 1.0
    while True:
        shifted = moments.clone()
        shifted.diagonal()[:-1] += ridge * mean
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return torch.cholesky_inverse(factor)
        if ridge > MOST_RIDGE:
            raise SearchError(f"the moments of the inputs of {layer} cannot be inverted: use prune.compensate=off")
        ridge *= GROWTH
        logger.info("the moments of the inputs of %s are singular: the ridge is %g", layer, ridge)


def _guess(inverse: torch.Tensor, lost: Sequence[int]) -> np.ndarray:
    """The lost inputs as a function of the others and 1: float32 (lost, inputs + 1), 0 in lost columns."""
    index = torch.tensor(lost, dtype=torch.long)
    rows = inverse[index]
    found = -torch.linalg.solve(rows[:, index], rows) if len(lost) else rows
    found[:, index] = 0
    return found.float().numpy()


def _without(inverse: torch.Tensor, lost: Sequence[int]) -> torch.Tensor:
    if not lost:
        return inverse
    gone = torch.tensor(lost, dtype=torch.long)
    stays = torch.ones(len(inverse), dtype=torch.bool)
    stays[gone] = False
    kept = stays.nonzero().flatten()
    columns = inverse[kept][:, gone]
    inner = torch.linalg.solve(inverse[gone][:, gone], columns.T)
    return inverse[kept][:, kept] - columns @ inner
