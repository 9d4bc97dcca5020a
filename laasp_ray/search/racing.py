"""Racing: candidates are compared on a growing common sample, and those that are worse with confidence are dropped.

The candidates differ most on a few hard images. So the images are stratified by the unpruned network's own loss on
each, and the hard strata, which are small, are sampled most. Soon all images of a hard stratum are used, and it adds no
error. Two candidates are compared by their paired differences, image by image. The bound is normal, with the variance
of a stratified mean without replacement (Cochran, Sampling Techniques, 1977, 5.3). The best candidate is wrongly
dropped only if in some round another candidate seems better by more than the bound. So the error is divided equally
between all candidates and rounds. In the last round all images are used, and no error is left. With a margin a
candidate is dropped, too, if it is better by less than that with confidence.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

STRATA = 8
FIRST_LOOK = 192
GROWTH = 1.3
LEAST_WEIGHT = 0.005
"""A stratum's share of the sample depends on its images' weights. A weight is 1 - exp(-loss), the probability that the
network gives to wrong classes, but at least this value.
"""
LEAST_IMAGES = 4
"""The smallest number of images of a stratum in the first round: one image shows no variance."""
PRIOR_IMAGES = 8
"""The variance of a candidate's differences in a stratum is pooled with that of all candidates, weighted as this number
of images.
"""
UNSEEN = 0.02
"""Among many easy images a small sample may miss rare, large differences and must not look certain. So this share of
the pair's largest square is added to each stratum's sum of squares.
"""


def strata_of(base: np.ndarray) -> list[np.ndarray]:
    """The positions of images in strata of equal total weight, easiest first. `base` (n,) are the images' losses."""
    weights = np.maximum(-np.expm1(-np.nan_to_num(base, nan=np.inf)), LEAST_WEIGHT)
    order = np.argsort(np.nan_to_num(base, nan=np.inf), kind="stable")
    reached = np.cumsum(weights[order])
    middles = reached - weights[order] / 2  # an image belongs to the stratum of its weight's middle
    bounds = np.searchsorted(middles, reached[-1] * np.arange(1, STRATA) / STRATA)
    return [part for part in np.split(order, bounds) if len(part)]


class Race:
    """The state of a race between `candidates` candidates. `base` (n,) are the images' losses without a prune.

    `samples[t]` are the positions of the images that round t adds. All samples depend only on `base` and `seed`, so the
    order of the measurements does not matter. `error` is the probability that the best candidate on all images is
    dropped. `margin` is the difference of losses that does not matter: the bound is then on dropping a candidate that
    is better than the choice by more.
    """

    def __init__(
        self, base: np.ndarray, candidates: int, *, error: float = 0.01, margin: float = 0.0, seed: int = 0
    ) -> None:
        draw = np.random.default_rng(seed)
        strata = strata_of(base)
        self._sizes = np.array([len(stratum) for stratum in strata])
        self._shares = self._sizes / len(base)
        orders = [draw.permutation(stratum) for stratum in strata]
        self.samples: list[np.ndarray] = []
        self._strata: list[np.ndarray] = []
        taken = np.zeros(len(strata), int)
        target = FIRST_LOOK
        while taken.sum() < len(base):
            counts = _fill(self._sizes, taken, target)
            parts = [order[a:b] for order, a, b in zip(orders, taken, counts, strict=True)]
            self.samples.append(np.concatenate(parts))
            self._strata.append(np.repeat(np.arange(len(strata)), counts - taken))
            taken, target = counts, int(target * GROWTH)
        self._margin = margin
        self.survivors = list(range(candidates))
        self.fell: dict[int, int] = {}
        self.rounds = 0
        self._limit = NormalDist().inv_cdf(1 - error / (max(1, candidates - 1) * len(self.samples)))
        self._losses = np.zeros((candidates, 0))
        self._stratum = np.zeros(0, int)
        self.estimates = np.full(candidates, np.nan)
        self.images = np.zeros(candidates, int)

    @property
    def decided(self) -> bool:
        return len(self.survivors) <= 1 or self.rounds == len(self.samples)

    def finish_round(self, losses: np.ndarray) -> list[int]:
        """Adds the survivors' losses (survivors, images of the next sample). Drops some survivors and returns them.

        A candidate with a loss that is not finite is dropped at once.
        """
        self._losses = np.concatenate([self._losses, losses.astype(np.float64)], 1)
        self._stratum = np.concatenate([self._stratum, self._strata[self.rounds]])
        self.rounds += 1
        estimates = self._means(self._losses)
        self.estimates[self.survivors] = estimates
        self.images[self.survivors] = self._losses.shape[1]
        stays = self._stays(np.where(np.isfinite(estimates), estimates, np.inf))
        dropped = [candidate for candidate, stay in zip(self.survivors, stays, strict=True) if not stay]
        self.fell.update(dict.fromkeys(dropped, self.rounds))
        self.survivors = [candidate for candidate, stay in zip(self.survivors, stays, strict=True) if stay]
        self._losses = self._losses[stays]
        return dropped

    def _stays(self, estimates: np.ndarray) -> np.ndarray:
        finite = np.isfinite(estimates)
        if not finite.any() or self.rounds == len(self.samples):
            return finite
        best = int(np.argmin(estimates))
        differences = self._losses[finite] - self._losses[best]
        greatest = (differences**2).max(1)
        variance = np.zeros(len(differences))
        for stratum, (size, share) in enumerate(zip(self._sizes, self._shares, strict=True)):
            inside = differences[:, self._stratum == stratum]
            seen = inside.shape[1]
            if seen == size:
                continue
            own = inside.var(1, ddof=1)
            others = own[np.arange(len(own)) != np.searchsorted(np.flatnonzero(finite), best)]
            pooled = float(np.median(others)) if len(others) else 0.0
            spread = (own * (seen - 1) + pooled * PRIOR_IMAGES) / (seen - 1 + PRIOR_IMAGES)
            variance += share**2 * (1 - seen / size) * (spread + UNSEEN * greatest / seen) / seen
        stays = np.zeros(len(estimates), bool)
        stays[finite] = self._means(differences) + self._margin <= self._limit * np.sqrt(variance)
        stays[best] = True
        return stays

    def _means(self, losses: np.ndarray) -> np.ndarray:
        """Stratified means of rows. Equal rows have equal means to the last bit, which a matrix product does not
        ensure.
        """
        means = [losses[:, self._stratum == stratum].mean(1) for stratum in range(len(self._sizes))]
        return np.asarray((self._shares[:, None] * np.stack(means)).sum(0))


def _fill(sizes: np.ndarray, taken: np.ndarray, total: int) -> np.ndarray:
    """The number of images of each stratum in a round with `total` or a few more. `taken` is that of the round before.

    Images are divided in proportion to the square roots of the strata's sizes. A stratum that is used up leaves its
    part to the others.
    """
    counts = np.maximum(taken, np.minimum(sizes, LEAST_IMAGES))
    total = min(total, int(sizes.sum()))
    while counts.sum() < total:
        weights = np.sqrt(sizes) * (counts < sizes)
        more = np.ceil((total - counts.sum()) * weights / weights.sum()).astype(int)
        counts = np.minimum(sizes, counts + more)
    return counts
