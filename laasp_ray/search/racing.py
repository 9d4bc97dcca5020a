"""Racing: candidates are compared on a growing common sample, and those that are worse with confidence drop out.

The differences between candidates sit on few, hard images. The images are therefore stratified by the unpruned
network's own loss on each, and the hard strata, which are small, are sampled most; soon all of a hard stratum is known
and adds no error. Two candidates are compared by their paired differences, image by image, with a normal bound at the
variance of a stratified mean without replacement (Cochran, Sampling Techniques, 1977, 5.3). One candidate is truly
best; it is wrongly dropped only if at some round some other one seems better by more than the bound, so that the error
is shared equally over all candidates and rounds. At the last round all images are known, and nothing is left to chance.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

STRATA = 8
FIRST_LOOK = 192
GROWTH = 1.3
LEAST_WEIGHT = 0.005
"""A stratum's share of the sample goes by its images' weights, 1 - exp(-loss), the chance that the network gives to
wrong classes; for easy images at least this."""
LEAST_IMAGES = 4
"""The first round has at least so many of every stratum: one image shows no variance."""
PRIOR_IMAGES = 8
"""The variance of a candidate's differences in a stratum is pooled with that of all candidates as if so many images
had shown it."""
UNSEEN = 0.02
"""Rare, great differences hide among the many easy images, where a small sample that saw none must not pass for
certainty: to each stratum's sum of squares is added this part of the greatest square that the pair has shown."""


def strata_of(base: np.ndarray) -> list[np.ndarray]:
    """The positions of images, easiest first, in strata of equal total weight; `base` (n,) are their losses."""
    weights = np.maximum(-np.expm1(-np.nan_to_num(base, nan=np.inf)), LEAST_WEIGHT)
    order = np.argsort(np.nan_to_num(base, nan=np.inf), kind="stable")
    reached = np.cumsum(weights[order])
    middles = reached - weights[order] / 2  # an image belongs where the middle of its weight lies
    bounds = np.searchsorted(middles, reached[-1] * np.arange(1, STRATA) / STRATA)
    return [part for part in np.split(order, bounds) if len(part)]


class Race:
    """The state of a race between `candidates` candidates, for images whose losses without a prune are `base` (n,).

    `samples[t]` are the images (positions) that round t adds to those before it; all of it follows from `base` and
    `seed`, so that nothing depends on who measures when. `error` is the chance that the best candidate on all images is
    dropped.
    """

    def __init__(self, base: np.ndarray, candidates: int, *, error: float = 0.01, seed: int = 0) -> None:
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
        """Takes in the survivors' losses (survivors, images of the next sample) and drops some of them, which it gives.

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
        stays[finite] = self._means(differences) <= self._limit * np.sqrt(variance)
        return stays

    def _means(self, losses: np.ndarray) -> np.ndarray:
        """Stratified means of rows, equal to the last bit for equal rows, as those of a matrix product are not."""
        means = [losses[:, self._stratum == stratum].mean(1) for stratum in range(len(self._sizes))]
        return np.asarray((self._shares[:, None] * np.stack(means)).sum(0))


def _fill(sizes: np.ndarray, taken: np.ndarray, total: int) -> np.ndarray:
    """How many of each stratum a round has that knows `total` or a few more, after one that knew `taken`.

    Images are shared by the square roots of the strata's sizes, what one cannot give going to the others.
    """
    counts = np.maximum(taken, np.minimum(sizes, LEAST_IMAGES))
    total = min(total, int(sizes.sum()))
    while counts.sum() < total:
        weights = np.sqrt(sizes) * (counts < sizes)
        more = np.ceil((total - counts.sum()) * weights / weights.sum()).astype(int)
        counts = np.minimum(sizes, counts + more)
    return counts
