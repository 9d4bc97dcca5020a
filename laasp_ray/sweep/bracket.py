"""Finds the deepest iteration of a trajectory whose network still meets a bar, several trials at a time.

A trial is the final training of the network after one iteration. Deeper iterations are worse but for noise, so what is
not known yet lies between the deepest one that met the bar and the next deeper one that did not. General searchers know
nothing of this order and need more trials; schedulers that compare trials with each other stop the deep ones first,
which may be the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from laasp_ray.errors import ConfigError


@dataclass(frozen=True)
class Bounds:
    """The answer lies from `met`, the deepest iteration that met the bar (0: the unpruned network), to just before
    `missed`, the next deeper one that did not (one more than the trajectory has: none).
    """

    met: int
    missed: int

    @property
    def is_exact(self) -> bool:
        return self.missed - self.met == 1


def bounds(results: Mapping[int, bool], iterations: int) -> Bounds:
    """The bounds after trials of some of 1 to `iterations`: iteration -> whether it met the bar.

    If a deeper iteration met the bar and a shallower one did not, which is noise, the deeper one counts. Raises
    ConfigError for an iteration that the trajectory does not have.
    """
    wrong = [iteration for iteration in results if not 1 <= iteration <= iterations]
    if wrong:
        raise ConfigError(f"iteration {wrong[0]} is none of the trajectory's 1 to {iterations}")
    met = max((iteration for iteration, meets in results.items() if meets), default=0)
    missed = min((iteration for iteration, meets in results.items() if not meets and iteration > met), default=None)
    return Bounds(met, iterations + 1 if missed is None else missed)


def next_iterations(results: Mapping[int, bool], running: Collection[int], iterations: int, slots: int) -> list[int]:
    """The iterations to try next, at most `slots`, beside those that are `running`. Empty if there is nothing to try.

    They and the running ones cut what is unknown as evenly as can be, so that k at once leave 1/(k + 1) of it.
    """
    known = bounds(results, iterations)
    inside = sorted(iteration for iteration in running if known.met < iteration < known.missed)
    if not inside:
        return _evenly(known, slots)
    chosen: list[int] = []
    for _ in range(slots):
        marks = [known.met, *sorted(inside + chosen), known.missed]
        gap, low = max((high - low, low) for low, high in itertools.pairwise(marks))
        if gap < 2:
            break
        chosen.append(low + gap // 2)
    return chosen


def _evenly(known: Bounds, slots: int) -> list[int]:
    width = known.missed - known.met
    places = [known.met + round(width * number / (slots + 1)) for number in range(1, slots + 1)]
    return sorted({place for place in places if known.met < place < known.missed}) or (
        [known.met + 1] if width > 1 and slots else []
    )


def is_needless(iteration: int, results: Mapping[int, bool], iterations: int) -> bool:
    """Whether a running trial can no longer change the answer: a deeper one met the bar, or a shallower one missed
    it.
    """
    known = bounds(results, iterations)
    return not known.met < iteration < known.missed


def cannot_meet(scores: Sequence[float], bar: float, finished: Sequence[Sequence[float]], slack: float) -> bool:
    """Whether a running trial cannot meet the bar any more, judged by what finished ones still gained.

    `scores` has those of the trial after each epoch so far, and `finished` those of trials that ran to their end.
    The most that any of them gained from that epoch to its end, and `slack` for noise, are granted. Without a finished
    trial nothing is known, and the answer is False.
    """
    gains = [other[-1] - other[len(scores) - 1] for other in finished if len(other) >= len(scores)]
    return bool(scores) and bool(gains) and scores[-1] + max(gains) + slack < bar
