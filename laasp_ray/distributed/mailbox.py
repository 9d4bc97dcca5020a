"""An actor that passes commands from the driver to the trainers, and results and heartbeats back.

It is an actor without CPUs beside the driver, so the driver can tell a group that is lost from one that works. Workers
wait for commands here and not in a collective, which would time out during a long search.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from laasp_ray.distributed.deadlines import Beat
from laasp_ray.distributed.places import Place


@dataclass(frozen=True)
class Command:
    """A command. The mailbox does not look into its payload."""

    number: int
    payload: Any


class Mailbox:
    """Holds at most one open command of one worker group. Every command has the next number."""

    def __init__(self) -> None:
        self._command: Command | None = None
        self._stopped = False
        self._changed = asyncio.Condition()
        self._met = asyncio.Event()
        self._posted: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._beats: dict[int, Beat] = {}

    async def submit(self, number: int, payload: Any) -> None:
        async with self._changed:
            self._command = Command(number, payload)
            self._changed.notify_all()

    async def stop(self) -> None:
        async with self._changed:
            self._stopped = True
            self._changed.notify_all()

    async def met(self) -> None:
        """Returns when the first worker has asked for a command."""
        await self._met.wait()

    async def next(self, after: int) -> Command | None:
        """Waits for a command with a number above `after` and returns it. None: no more commands come."""
        self._met.set()
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._stopped or (self._command is not None and self._command.number > after)
            )
            return None if self._stopped else self._command

    async def beat(self, rank: int, place: Place, command: int | None, work: int) -> None:
        """Takes a heartbeat of a rank (see Beat)."""
        before = self._beats.get(rank)
        self._beats[rank] = Beat(place, 1 if before is None else before.beats + 1, command, work)

    async def beats(self) -> Mapping[int, Beat]:
        """The last heartbeat of each rank."""
        return dict(self._beats)

    async def post(self, number: int, kind: str, value: Any) -> None:
        """Posts a result about command `number`: 'epoch', 'complaint' (a worker's last words), or 'done' or 'failed',
        which close the command.
        """
        if self._command is None or self._command.number != number:
            return  # a late word about a command that is closed
        if kind in ("done", "failed"):
            self._command = None
        await self._posted.put((kind, value))

    async def take(self) -> tuple[str, Any]:
        """Waits for the next posted result, in order."""
        return await self._posted.get()
