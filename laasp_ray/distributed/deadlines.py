"""Tells ranks that hang from slow ones: each posts heartbeats, and what is late follows from the pace that was seen."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from laasp_ray.distributed.places import Place

BEAT_S = 2.0
"""Seconds between two heartbeats of a rank."""
LOOK_S = 5.0
"""Seconds between two looks of the driver at the heartbeats."""
SILENT_S = 60.0
"""A rank without a heartbeat for so many seconds is late: its process is stopped, or its machine is gone."""
STUCK_S, STUCK_FACTOR = 120.0, 10.0
"""A rank whose work does not advance is late after STUCK_FACTOR times the usual seconds, at least STUCK_S."""
FIRST_STUCK_S = 900.0
"""The same for the first piece of work of a command, which opens loaders and may compile."""
_PACES = 100


@dataclass(frozen=True)
class Beat:
    """The last heartbeat of a rank. `beats` counts them.

    `command` is the number of the command that it works on, or None if it waits for one. `work` counts the pieces of
    work (batches loaded, steps, test batches) of that command.
    """

    place: Place
    beats: int
    command: int | None
    work: int


@dataclass(frozen=True)
class Late:
    """A rank that has to be replaced, and the reason."""

    rank: int
    place: Place
    reason: str

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.place}: {self.reason}"


@dataclass
class _Seen:
    """A rank's last heartbeat, when it came, and when its work last advanced."""

    beat: Beat
    heard_at: float
    advanced_at: float


class Deadlines:
    """Judges the ranks of a group by their heartbeats, as the driver sees them on its own clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ranks: dict[int, _Seen] = {}
        self._paces: deque[float] = deque(maxlen=_PACES)

    @property
    def places(self) -> list[Place]:
        """The places of all ranks that were heard of."""
        return [seen.beat.place for seen in self._ranks.values()]

    def restart(self) -> None:
        """Counts all times from now on, because nobody looked for a while."""
        now = self._clock()
        for seen in self._ranks.values():
            seen.heard_at = seen.advanced_at = now

    def look(self, beats: Mapping[int, Beat]) -> None:
        """Takes note of the ranks' last heartbeats."""
        now = self._clock()
        for rank, beat in beats.items():
            seen = self._ranks.get(rank)
            if seen is None or seen.beat.place != beat.place or seen.beat.command != beat.command:
                self._ranks[rank] = _Seen(beat, now, now)
                continue
            if beat.beats != seen.beat.beats:
                seen.heard_at = now
            if beat.work != seen.beat.work:
                self._paces.append((now - seen.advanced_at) / (beat.work - seen.beat.work))
                seen.advanced_at = now
            seen.beat = beat

    def late(self) -> list[Late]:
        """The ranks that are late.

        If one rank hangs, the others wait for it in their next step. So of those that do not advance only the ones that
        have done least are late.
        """
        now = self._clock()
        silent = {
            rank: f"no heartbeat for {now - seen.heard_at:.0f} s"
            for rank, seen in self._ranks.items()
            if now - seen.heard_at > SILENT_S
        }
        stuck = dict(self._stuck(now)) if not silent else {}
        least = min((self._ranks[rank].beat.work for rank in stuck), default=0)
        reasons = silent | {rank: reason for rank, reason in stuck.items() if self._ranks[rank].beat.work == least}
        return [Late(rank, self._ranks[rank].beat.place, reason) for rank, reason in sorted(reasons.items())]

    def _stuck(self, now: float) -> Iterator[tuple[int, str]]:
        usual = max(STUCK_S, STUCK_FACTOR * statistics.median(self._paces)) if self._paces else FIRST_STUCK_S
        for rank, seen in self._ranks.items():
            allowed = usual if seen.beat.work else max(usual, FIRST_STUCK_S)
            waited = now - seen.advanced_at
            if seen.beat.command is not None and waited > allowed:
                yield rank, f"nothing done for {waited:.0f} s after {seen.beat.work} pieces of work"
