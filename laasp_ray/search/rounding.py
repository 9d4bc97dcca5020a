"""What a fast precision changes in a race's losses.

A fast loss is near the full one on the same image. So the mean of their differences is known from few images, though
the losses need many: the full loss's mean is the fast one's plus that mean (a regression estimate with slope 1;
Cochran, Sampling Techniques, 1977, 7.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from laasp_ray.search.stratified import Sample

SLACK = 1.0
"""Where only the leader is measured in full, others are believed to be off by at most this times its mean size of the
difference, and by RELATIVE of their distance from it.
"""
RELATIVE = 1 / 32


class Rounding:
    """The full losses of some candidates on the first images of a sample.

    `fast` (candidates, n) are the fast losses, which are filled in meanwhile.
    """

    def __init__(self, sample: Sample, fast: np.ndarray) -> None:
        self._sample, self._fast = sample, fast
        self._full = np.full(fast.shape, np.nan, np.float32)
        self._sizes = [int(size) for size in np.cumsum([len(images) for images in sample.rounds])]
        self._rounds: dict[int, int] = {}

    def add(self, candidates: Sequence[int], images: np.ndarray, losses: np.ndarray) -> None:
        """Adds full losses (candidates, images), the images being those of the next rounds of each candidate."""
        self._full[np.array(candidates)[:, None], images] = losses
        for candidate in candidates:
            reached = (self._sizes[self._rounds[candidate] - 1] if self.rounds(candidate) else 0) + len(images)
            self._rounds[candidate] = self._sizes.index(reached) + 1

    def rounds(self, candidate: int) -> int:
        """The number of rounds whose images it is measured on in full."""
        return self._rounds.get(candidate, 0)

    def more(self, rounds: int, most: int) -> int:
        """The number of rounds, up to `most`, that have twice the images of `rounds`."""
        wanted = 2 * self._sizes[rounds - 1] if rounds else 1
        return min(most, next((number + 1 for number, size in enumerate(self._sizes) if size >= wanted), most))

    def mean(self, candidate: int) -> float:
        """What its loss gains in full precision; 0 if it is not measured."""
        rounds = self.rounds(candidate)
        return float(self._sample.means(self._errors([candidate], rounds), rounds)[0]) if rounds else 0.0

    def slack(self, leader: int) -> float:
        """By how much others that are near the leader, and are not measured in full, may be off."""
        rounds = self.rounds(leader)
        return SLACK * float(self._sample.means(np.abs(self._errors([leader], rounds)), rounds)[0])

    def against(self, leader: int, others: Sequence[int]) -> Mapping[int, tuple[float, float]]:
        """What others gain in full precision more than the leader, and the variance of that. All are measured so."""
        found: dict[int, tuple[float, float]] = {}
        for rounds in {min(self.rounds(leader), self.rounds(other)) for other in others}:
            some = [other for other in others if min(self.rounds(leader), self.rounds(other)) == rounds]
            errors = self._errors(some, rounds) - self._errors([leader], rounds)
            means, variances = self._sample.means(errors, rounds), self._sample.variances(errors, rounds)
            found.update(zip(some, zip(means.tolist(), variances.tolist(), strict=True), strict=True))
        return found

    def _errors(self, candidates: Sequence[int], rounds: int) -> np.ndarray:
        rows, images = np.array(candidates)[:, None], self._sample.images(rounds)
        return self._full[rows, images].astype(np.float64) - self._fast[rows, images]
