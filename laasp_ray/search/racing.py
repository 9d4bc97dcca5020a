"""Racing: candidates are compared on a growing common sample, and those that are worse with confidence are dropped.

Every candidate's loss is compared with the unpruned network's own on the same image (search/stratified.py). The
candidate that looks best after the first round is measured on all images. Its mean is then exact, and each other
candidate is dropped as soon as the lower bound of its mean is above that. The sample of a candidate may miss images on
which it is much worse. Those can only raise its mean, so that nothing is dropped by mistake because of them. They are
found before a candidate is chosen, as the choice is measured on all images.

Losses may be measured in a fast precision, with errors that are small beside the differences between images. The
leader, and the candidates that are too near to it for these errors, are measured in full precision, too, on the
sample's first images (search/rounding.py).

The bound is normal. The error is divided equally between all candidates and rounds. With a margin a candidate is
dropped, too, if it is better by less than that with confidence.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from laasp_ray.search.rounding import RELATIVE, Rounding
from laasp_ray.search.stratified import GROWTH, Sample


@dataclass(frozen=True, eq=False)
class Request:
    """Losses that a race needs: of these candidates (rising) on the images at these positions.

    They are those of the next round (`round`), all that a candidate was not measured on (`whole`), or losses in full
    precision where the others are in a fast one (`full`).
    """

    kind: Literal["round", "whole", "full"]
    candidates: tuple[int, ...]
    images: np.ndarray


class Race:
    """A race between `candidates` candidates. `base` (n,) are the images' losses without a prune.

    `requests` says what to measure next, and `finish` takes it. All samples depend only on `base` and `seed`, so the
    order of the measurements does not matter. The candidates of `survivors` are still in the race, those of `whole` are
    measured on all images: their means. `error` is the probability that the best candidate on all images is dropped.
    `margin` is the difference of losses that does not matter: the bound is then on dropping a candidate that is better
    than the choice by more. `growth` is the factor by which the images grow in number from round to round. With `fast`,
    losses are of a fast precision, as `base` is, unless a request is for `full`.
    """

    def __init__(
        self,
        base: np.ndarray,
        candidates: int,
        *,
        error: float = 0.01,
        margin: float = 0.0,
        growth: float = GROWTH,
        seed: int = 0,
        fast: bool = False,
    ) -> None:
        self.sample = Sample(base, seed, growth)
        self._base = np.where(np.isfinite(base), base, 0.0).astype(np.float64)
        self._nonnegative = bool((self._base >= 0).all())
        self._margin = margin
        tests = max(1, candidates - 1) * len(self.sample.rounds) * (2 if fast else 1)
        self._limit = NormalDist().inv_cdf(1 - error / tests)
        self._losses = np.full((candidates, len(base)), np.nan)
        self._rounding = Rounding(self.sample, self._losses) if fast else None
        self._sampled = list(range(candidates))
        self._errors = np.zeros(candidates)  # standard errors of the estimates
        self.survivors = list(range(candidates))
        self.whole: dict[int, float] = {}
        self.fell: dict[int, int] = {}
        self.rounds = 0
        self.estimates = np.full(candidates, np.nan)
        self.images = np.zeros(candidates, int)

    @property
    def sampled(self) -> list[int]:
        """The survivors that rounds measure: those that are not measured on all images."""
        return list(self._sampled)

    @property
    def choice(self) -> int | None:
        """The survivor with the lowest loss so far, or None if there is none."""
        return min(self.survivors, key=lambda candidate: (self.loss(candidate), candidate), default=None)

    def loss(self, candidate: int) -> float:
        """The estimate of a candidate's loss in full precision."""
        rounded = self._rounding.mean(candidate) if self._rounding is not None else 0.0
        return float(self.estimates[candidate]) + rounded

    def requests(self) -> list[Request]:
        """What to measure next, all of it together. Nothing if the choice is known: every survivor is measured on all
        images then.
        """
        leader = self._new_leader()
        if leader is not None:
            found = [Request("whole", (leader,), np.concatenate(self.sample.rounds[self.rounds :]))]
            return found + self._in_full([leader], {leader: 1})
        checks = self._checks()
        if checks or not self._sampled:
            return checks
        return [Request("round", tuple(self._sampled), self.sample.rounds[self.rounds])]

    def finish(self, request: Request, losses: np.ndarray) -> list[int]:
        """Adds the losses (candidates, images) of a request. Drops some survivors and returns them.

        A candidate with a loss that is not finite is dropped at once.
        """
        self._nonnegative = self._nonnegative and not bool((losses < 0).any())
        failed = {one: row for one, row in zip(request.candidates, losses, strict=True) if not np.isfinite(row).all()}
        if request.kind == "full":
            assert self._rounding is not None
            self._rounding.add(request.candidates, request.images, losses)
        else:
            self._losses[np.array(request.candidates)[:, None], request.images] = losses
            self.images[list(request.candidates)] += len(request.images)
            self.rounds += int(request.kind == "round")
        dropped = self._drop(failed)
        for candidate, row in failed.items():
            self.estimates[candidate] = row.mean()
        if request.kind == "round":
            self._estimate()
        for candidate in [one for one in self._sampled if self.images[one] == len(self._base)]:
            self._sampled.remove(candidate)
            mean = self.estimates[candidate] = self._losses[candidate].mean()
            self.whole[candidate], self._errors[candidate] = float(mean), 0.0
        return dropped + self._drop_worse()

    def _estimate(self) -> None:
        """The estimates of all that are sampled, and their standard errors."""
        if not self._sampled:
            return
        seen = self.sample.images(self.rounds)
        differences = self._losses[np.array(self._sampled)[:, None], seen] - self._base[seen]
        self.estimates[self._sampled] = self._base.mean() + self.sample.means(differences, self.rounds)
        improvement = np.maximum(-differences, 0).max(1)[:, None] + np.zeros(len(self.sample.hardest))
        if self._nonnegative:
            improvement = np.minimum(improvement, self.sample.hardest)
        self._errors[self._sampled] = np.sqrt(self.sample.variances(differences, self.rounds, improvement))

    def _new_leader(self) -> int | None:
        """The candidate that has to be measured on all images next, or None.

        It is the one that looks best if none is measured so yet, if it is better than these with confidence, or if no
        other one is left that could be.
        """
        if not self._sampled or not self.rounds:
            return None
        best = min(self._sampled, key=lambda candidate: (self.estimates[candidate], candidate))
        doubt = 0.0 if len(self._sampled) == 1 else self._limit * self._errors[best]
        least = min(self.whole.values(), default=np.inf)
        return best if self.estimates[best] + self._margin + doubt < least else None

    def _drop_worse(self) -> list[int]:
        """Drops the candidates that are worse than the best of those on all images with confidence."""
        leader = self._leader()
        if leader is None:
            return []
        others = self._sampled if self._rounding is None else [one for one in self.survivors if one != leader]
        distances, errors = self._distances(leader, others)
        worse = distances + self._margin > self._limit * errors
        return self._drop([other for other, is_worse in zip(others, worse, strict=True) if is_worse])

    def _leader(self) -> int | None:
        """The best of those that are measured on all images; in full precision as well, where there are two."""
        known = [one for one in self.whole if self._rounding is None or self._rounding.rounds(one)]
        if self._rounding is None or not known:
            return min(known, key=lambda one: (self.whole[one], one), default=None)
        against = self._rounding.against(known[0], known)
        return min(known, key=lambda one: (self.whole[one] + against[one][0], one))

    def _distances(self, leader: int, others: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """How much worse others are than the leader, and the standard errors of that."""
        distances = self.estimates[list(others)] - self.whole[leader]
        variances = self._errors[list(others)] ** 2
        if self._rounding is not None:
            slack = self._rounding.slack(leader)
            against = self._rounding.against(leader, [other for other in others if self._rounding.rounds(other)])
            for place, other in enumerate(others):
                if other in against:
                    distances[place] += against[other][0]
                    variances[place] += against[other][1]
                else:
                    distances[place] -= slack + RELATIVE * abs(distances[place])
        return distances, np.sqrt(variances)

    def _checks(self) -> list[Request]:
        """Requests in full precision for those whose distance from the leader is no larger than a fast precision's
        errors.
        """
        leader = self._leader()
        if self._rounding is None or leader is None:
            return []
        others = [one for one in self.survivors if one != leader]
        against = self._rounding.against(leader, [other for other in others if self._rounding.rounds(other)])
        wanted: dict[int, int] = {}
        for other in others:
            apart = self.estimates[other] - self.whole[leader] + self._margin > self._limit * self._errors[other]
            is_whole = other in self.whole
            if not (apart or is_whole) or (other in against and against[other][1] <= self._errors[other] ** 2):
                continue
            most = len(self.sample.rounds) if is_whole else self.rounds
            wanted[other] = self._rounding.more(self._rounding.rounds(other), most)
        if wanted:
            wanted[leader] = max(self._rounding.rounds(leader), *wanted.values())
        return self._in_full([one for one in self.survivors if one in wanted], wanted)

    def _in_full(self, candidates: Sequence[int], wanted: dict[int, int]) -> list[Request]:
        """Requests for full losses of candidates on the images of the `wanted` first rounds of each."""
        if self._rounding is None:
            return []
        found: dict[tuple[int, int], list[int]] = {}
        for candidate in candidates:
            there = self._rounding.rounds(candidate)
            if wanted[candidate] > there:
                found.setdefault((there, wanted[candidate]), []).append(candidate)
        return [
            Request("full", tuple(some), np.concatenate(list(itertools.islice(self.sample.rounds, start, stop))))
            for (start, stop), some in found.items()
        ]

    def _drop(self, candidates: Collection[int]) -> list[int]:
        self.fell.update(dict.fromkeys(candidates, self.rounds))
        self.survivors = [candidate for candidate in self.survivors if candidate not in candidates]
        self._sampled = [candidate for candidate in self._sampled if candidate not in candidates]
        self.whole = {candidate: mean for candidate, mean in self.whole.items() if candidate not in candidates}
        return list(candidates)
