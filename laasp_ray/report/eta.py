"""The remaining time, from the pace of a growing quantity."""

from __future__ import annotations

from collections.abc import Callable


class EtaEstimator:
    """Follows one growing quantity. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: tuple[float, float] | None = None
        self._last: tuple[float, float] | None = None

    def update(self, value: float) -> None:
        """Records the quantity's current `value`. The pace is measured from the first call on."""
        self._last = (self._clock(), value)
        self._first = self._first or self._last

    def seconds_until(self, goal: float) -> float | None:
        """Seconds from now until `goal`, at the mean pace so far. None until the quantity has grown once."""
        if self._first is None or self._last is None:
            return None
        grown, took = self._last[1] - self._first[1], self._last[0] - self._first[0]
        if grown <= 0 or took <= 0:
            return None
        since = self._clock() - self._last[0]
        return max(0.0, (goal - self._last[1]) * took / grown - since)


def format_duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
