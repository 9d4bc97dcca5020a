"""The processes that a process has started, directly or not, also after it has left them behind."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_PROC = Path("/proc")


class Descendants:
    """All processes seen under `root`. They are known by id and start time: an id may be given again."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._seen: dict[int, int] = {}

    def look(self) -> None:
        """Adds the processes that are there now: under the root, and under one that was seen before."""
        table = _table()
        alive = {pid for pid, start in self._seen.items() if table.get(pid, (0, -1))[1] == start}
        found = {self._root} | alive
        while more := {pid for pid, (parent, _) in table.items() if parent in found} - found:
            found |= more
        self._seen.update({pid: table[pid][1] for pid in found - {self._root} if pid in table})

    def alive(self) -> list[int]:
        table = _table()
        return [pid for pid, start in self._seen.items() if table.get(pid, (0, -1))[1] == start]

    def kill(self) -> None:
        """Ends those that are still there, and what they have started meanwhile."""
        for _ in range(20):
            self.look()
            there = self.alive()
            if not there:
                return
            for pid in there:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)


def _table() -> dict[int, tuple[int, int]]:
    """Process id -> (parent's id, start time) of all processes that run; a zombie has ended."""
    found = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    found[int(entry.name)] = (int(fields[1]), int(fields[19]))
    return found
