"""Racing: candidates are compared on a growing common sample, and those that are worse with confidence are dropped.

Every candidate's loss is compared with the unpruned network's own on the same image. The differences grow with that own
loss. So images are stratified by it, and strata where it is high, which are small, are sampled most. The candidate that
looks best after `LEADER_AFTER` rounds is measured on all images. Its mean is then exact, and each other candidate is
dropped as soon as the lower bound of its mean is above that. The sample of a candidate may miss images on which it is
much worse. Those can only raise its mean, so that nothing is dropped by mistake because of them, and they are found
before a candidate is chosen, as the choice is measured on all images.

The bound is normal, with the variance of a stratified mean without replacement (Cochran, Sampling Techniques, 1977,
5.3). The error is divided equally between all candidates and rounds. With a margin a candidate is dropped, too, if it
is better by less than that with confidence.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

STRATA = 16
FIRST_LOOK = 64
GROWTH = 1.3
LEADER_AFTER = 2
"""The number of rounds before the first candidate is measured on all images. Before, nothing is dropped."""
LEAST_WEIGHT = 0.0005
"""A stratum's share of the sample depends on its images' weights. A weight is 1 - exp(-loss), the probability that the
network gives to wrong classes, but at least this value.
"""
LEAST_IMAGES = 3
"""The smallest number of images of a stratum in the first round: one image shows no variance."""
PRIOR_IMAGES = 16
"""The variance of a candidate's differences in a stratum is pooled with that of all candidates, weighted as this number
of images.
"""
SIZE_POWER = 0.25
"""Images are divided between strata in proportion to this power of their sizes."""
UNSEEN = 0.02
"""A small sample may miss rare images on which a candidate is much better than the unpruned network, and must not look
certain. So this share of the largest square of such a difference is added to each stratum's sum of squares. Where no
loss is negative, it is not larger than the unpruned network's own loss.
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
    order of the measurements does not matter. Candidates of `survivors` are still in the race. Those of `whole` are
    measured on all images: their means. `error` is the probability that the best candidate on all images is dropped.
    `margin` is the difference of losses that does not matter: the bound is then on dropping a candidate that is better
    than the choice by more.
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
        self._base = np.where(np.isfinite(base), base, 0.0).astype(np.float64)
        self._hardest = np.array([self._base[stratum].max() for stratum in strata])
        self._nonnegative = bool((self._base >= 0).all())
        self.survivors = list(range(candidates))
        self.whole: dict[int, float] = {}
        self.fell: dict[int, int] = {}
        self.rounds = 0
        self._limit = NormalDist().inv_cdf(1 - error / (max(1, candidates - 1) * len(self.samples)))
        self._sampled = list(range(candidates))
        self._losses = np.zeros((candidates, 0), np.float32)  # of the sampled candidates, on all rounds so far
        self._stratum = np.zeros(0, int)
        self._errors = np.zeros(candidates)  # standard errors of the estimates
        self.estimates = np.full(candidates, np.nan)
        self.images = np.zeros(candidates, int)

    @property
    def sampled(self) -> list[int]:
        """The survivors that the next round measures: those that are not measured on all images."""
        return list(self._sampled)

    @property
    def decided(self) -> bool:
        """Whether the choice is known. All survivors are measured on all images then."""
        return not self._sampled

    @property
    def choice(self) -> int | None:
        """The survivor with the lowest estimate, or None if there is none."""
        return min(self.survivors, key=lambda candidate: (self.estimates[candidate], candidate), default=None)

    def leader(self) -> int | None:
        """The candidate that has to be measured on all images before the next round, or None.

        It is the one that looks best if none is measured so yet, if it is better than these with confidence, or if no
        other one is left that could be.
        """
        if not self._sampled or self.rounds < min(LEADER_AFTER, len(self.samples)):
            return None
        best = min(self._sampled, key=lambda candidate: (self.estimates[candidate], candidate))
        doubt = 0.0 if len(self._sampled) == 1 else self._limit * self._errors[best]
        return best if self.estimates[best] + self._margin + doubt < self._least else None

    def finish_round(self, losses: np.ndarray) -> list[int]:
        """Adds losses (sampled, images of the next sample). Drops some survivors and returns them.

        A candidate with a loss that is not finite is dropped at once.
        """
        self._nonnegative = self._nonnegative and not bool((losses < 0).any())
        self._losses = np.concatenate([self._losses, losses], 1)
        self._stratum = np.concatenate([self._stratum, self._strata[self.rounds]])
        self.rounds += 1
        self.images[self._sampled] = self._losses.shape[1]
        seen = np.concatenate(self.samples[: self.rounds])
        if self.rounds == len(self.samples):
            by_image = np.ascontiguousarray(self._losses[:, np.argsort(seen)])
            return [
                gone
                for candidate, row in zip(self.sampled, by_image, strict=True)
                for gone in self._end(candidate, row)
            ]
        differences = self._losses - self._base[seen]
        self.estimates[self._sampled] = self._base.mean() + self._means(differences)
        self._errors[self._sampled] = np.sqrt(self._variances(differences))
        return self._drop([c for c in self._sampled if not np.isfinite(self.estimates[c])]) + self._drop_worse()

    def finish_whole(self, candidate: int, losses: np.ndarray) -> list[int]:
        """Adds a candidate's losses (n,) on all images. Drops some survivors and returns them."""
        self._nonnegative = self._nonnegative and not bool((losses < 0).any())
        self.images[candidate] = len(losses)
        return self._end(candidate, losses) + self._drop_worse()

    def _end(self, candidate: int, losses: np.ndarray) -> list[int]:
        """Ends the sampling of a candidate with losses (n,) on all images. Drops it if its mean is not finite."""
        mean = self.estimates[candidate] = losses.mean(dtype=np.float64)
        if not np.isfinite(mean):
            return self._drop([candidate])
        self.whole[candidate] = float(mean)
        self._keep([other != candidate for other in self._sampled])
        return []

    @property
    def _least(self) -> float:
        return min(self.whole.values(), default=np.inf)

    def _drop_worse(self) -> list[int]:
        least = self._least
        if not np.isfinite(least):
            return []
        return self._drop(
            [
                candidate
                for candidate in self._sampled
                if self.estimates[candidate] - least + self._margin > self._limit * self._errors[candidate]
            ]
        )

    def _drop(self, candidates: list[int]) -> list[int]:
        gone = set(candidates)
        self.fell.update(dict.fromkeys(candidates, self.rounds))
        self.survivors = [candidate for candidate in self.survivors if candidate not in gone]
        self._keep([candidate not in gone for candidate in self._sampled])
        return candidates

    def _keep(self, stay: list[bool]) -> None:
        """Leaves those of the sampled candidates in the sample."""
        self._sampled = [candidate for candidate, stays in zip(self._sampled, stay, strict=True) if stays]
        self._losses = self._losses[np.array(stay, bool)]

    def _variances(self, differences: np.ndarray) -> np.ndarray:
        """The variances of the estimates of rows (sampled, images so far)."""
        improvement = np.maximum(-differences, 0).max(1, initial=0)
        variance = np.zeros(len(differences))
        for stratum, (size, share) in enumerate(zip(self._sizes, self._shares, strict=True)):
            inside = differences[:, self._stratum == stratum]
            seen = inside.shape[1]
            if seen == size or not len(inside):
                continue
            own = inside.var(1, ddof=1)
            spread = (own * (seen - 1) + float(np.median(own)) * PRIOR_IMAGES) / (seen - 1 + PRIOR_IMAGES)
            most = np.minimum(improvement, self._hardest[stratum]) if self._nonnegative else improvement
            variance += share**2 * (1 - seen / size) * (spread + UNSEEN * most**2 / seen) / seen
        return variance

    def _means(self, values: np.ndarray) -> np.ndarray:
        """Stratified means of rows. Equal rows have equal means to the last bit, which a matrix product does not
        ensure.
        """
        means = [values[:, self._stratum == stratum].mean(1) for stratum in range(len(self._sizes))]
        return np.asarray((self._shares[:, None] * np.stack(means)).sum(0))


def _fill(sizes: np.ndarray, taken: np.ndarray, total: int) -> np.ndarray:
    """The number of images of each stratum in a round with `total` or a few more. `taken` is that of the round before.

    Images are divided in proportion to SIZE_POWER of the strata's sizes. A stratum that is used up leaves its part to
    the others.
    """
    counts = np.maximum(taken, np.minimum(sizes, LEAST_IMAGES))
    total = min(total, int(sizes.sum()))
    while counts.sum() < total:
        weights = sizes**SIZE_POWER * (counts < sizes)
        more = np.ceil((total - counts.sum()) * weights / weights.sum()).astype(int)
        counts = np.minimum(sizes, counts + more)
    return counts
