"""Whether the machine was free enough, while something was timed, for the times to mean anything."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

STARVED = 0.9
"""A process that computes and gets less of a core than this waits for others."""
SPREAD = 0.5
"""Times of one network that lie further apart than this share of their median."""
_ROOM = 0.25
"""What others may take beyond the cores that are left over, in cores."""


@dataclass(frozen=True)
class MachineLoad:
    """A machine of `cores` while something was timed: the mean cores that this process used while it computed
    (`own`), and that all other processes used meanwhile (`others`).
    """

    cores: int
    own: float
    others: float


def why_too_busy(load: MachineLoad, threads: int, spreads: Sequence[float], *, on_cpu: bool) -> tuple[str, ...]:
    """The reasons why times mean nothing; empty if there are none.

    `threads` is what computed, and `spreads` has for each network the distance of its 10th and 90th percentile as a
    share of the median. A process that waits for a GPU may use less than a core.
    """
    reasons = []
    if on_cpu and load.own < STARVED:
        reasons.append(f"while it computed, this process got {load.own:.2f} of a core")
    if load.others + min(threads, load.cores) > load.cores + _ROOM:
        reasons.append(
            f"other processes used {load.others:.1f} of {load.cores} cores, beside {threads} threads of its own"
        )
    if spreads and max(spreads) > SPREAD:
        reasons.append(f"times of one network lie {max(spreads):.0%} of their median apart")
    return tuple(reasons)


class LoadMeter:
    """Measures the machine's load from its making until `read`. `note` gets every pass."""

    def __init__(self) -> None:
        self._wall = self._own = 0.0
        self._began = time.perf_counter()
        self._own_at_first, self._busy_at_first = time.process_time(), _busy_seconds()

    def note(self, wall_s: float, cpu_s: float) -> None:
        """Adds a pass: its seconds by the clock, and those of this process on all cores."""
        self._wall += wall_s
        self._own += cpu_s

    def read(self) -> MachineLoad:
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        own = time.process_time() - self._own_at_first
        others = max(_busy_seconds() - self._busy_at_first - own, 0.0) / elapsed
        return MachineLoad(os.cpu_count() or 1, self._own / max(self._wall, 1e-9), others)


def _busy_seconds() -> float:
    """Seconds that all processes of the machine have computed, on all cores; stolen ones are others', too."""
    times = psutil.cpu_times()
    counted = ("user", "system", "nice", "irq", "softirq", "steal")  # a guest's are in user
    return float(sum(getattr(times, name, 0.0) for name in counted))
