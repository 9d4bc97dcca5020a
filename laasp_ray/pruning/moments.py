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
from functools import cached_property

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
        of_groups = zip(self.inverse, self._connected, lost, strict=True)
        return Compensation(tuple(_guess(*of_group) for of_group in of_groups), reader.sharing)

    @cached_property
    def _connected(self) -> tuple[torch.Tensor, ...]:
        """Of each group which inputs (inputs + 1) have to do with any other. Those that are always 0 do not."""
        return tuple(inverse.count_nonzero(1) > 1 for inverse in self.inverse)


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
    # On a map of one place most taps of a kernel only ever read padding: 4,096 of 4,608 inputs, 700 times the work.
    ever = moments.diagonal() != 0
    whole = bool(ever.all())
    there = moments if whole else moments[ever][:, ever]
    while True:
        shifted = there.clone()
        shifted.diagonal()[:-1] += ridge * mean
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            found = torch.cholesky_inverse(factor)
            return found if whole else _spread(found, ever, 1 / (ridge * mean))
        if ridge > MOST_RIDGE:
            raise SearchError(f"the moments of the inputs of {layer} cannot be inverted: use prune.compensate=off")
        ridge *= GROWTH
        logger.info("the moments of the inputs of %s are singular: the ridge is %g", layer, ridge)


def _spread(inverse: torch.Tensor, ever: torch.Tensor, value: float) -> torch.Tensor:
    """The inverse with the inputs that are always 0, whose moments are the ridge alone, among the others."""
    places = ever.nonzero().flatten()
    found = torch.diag((~ever).to(inverse.dtype) * value)
    found[places.unsqueeze(1), places] = inverse
    return found


def _guess(inverse: torch.Tensor, connected: torch.Tensor, lost: Sequence[int]) -> LostInputs:
    """The lost inputs as a function of the others and 1."""
    gone = torch.zeros(len(inverse), dtype=torch.bool)
    gone[list(lost)] = True
    explained, by = (gone & connected).nonzero().flatten(), (~gone & connected).nonzero().flatten()
    by = torch.cat([by[by < len(inverse) - 1], torch.tensor([len(inverse) - 1])])  # with the constant at its end
    rows = inverse[explained]
    found = -torch.cholesky_solve(rows[:, by], torch.linalg.cholesky(rows[:, explained]))
    return LostInputs(tuple(lost), explained.numpy(), by[:-1].numpy(), found.float().numpy())


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
