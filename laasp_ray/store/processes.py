"""Processes by what tells them apart across hosts, containers, restarts and reused numbers."""

from __future__ import annotations

import functools
import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """`machine` is of one boot and one namespace of process numbers; empty where the system does not tell. `started`
    tells apart two processes that had one number after another."""

    host: str
    pid: int
    machine: str
    started: str

    def is_here(self, other: Process) -> bool:
        """Whether both are processes of one machine, so that their numbers mean the same."""
        return self.machine != "" and (self.host, self.machine) == (other.host, other.machine)

    def exists(self) -> bool:
        """Whether it still runs, stopped or not; asked on its own machine."""
        return _started(self.pid) == self.started


def this_process() -> Process:
    """The one that asks."""
    pid = os.getpid()
    return Process(socket.gethostname(), pid, _machine(), _started(pid))


@functools.cache
def _machine() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks; empty if there is none, or only its remains."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # the name before may hold blanks
    return "" if fields[0] in "ZX" else fields[19]
