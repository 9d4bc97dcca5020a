"""What one turn of any method gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from laasp_ray.pruning.plan import Plan
from laasp_ray.records import CandidateLoss, Decision, Ranking

OnCandidate = Callable[[int, int, CandidateLoss | None], None]


@dataclass(frozen=True)
class Turn:
    """One turn of the loop: the choice, the prune that carries it out, the candidates' losses (empty for a method that
    compares none), and seconds by where they went."""

    decision: Decision
    step: Plan
    ranking: Ranking
    seconds: Mapping[str, float]


class Stopwatch:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
