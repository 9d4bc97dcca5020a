"""The place where the driver leaves commands for the trainers, and rank 0 its results.

An actor of its own, without CPUs, so that it outlives the worker group: after a restart the group asks again and is
given the command it did not finish, with the last epoch that was. Workers wait here, not in a collective, which would
time out while a long search goes on.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """`resume` is what rank 0 last posted of this command (None: nothing); payloads are opaque here."""

    number: int
    payload: Any
    resume: Any = None


class Mailbox:
    """At most one command is open at a time; its number rises by one with each."""

    def __init__(self) -> None:
        self._command: Command | None = None
        self._stopped = False
        self._changed = asyncio.Condition()
        self._posted: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    async def submit(self, number: int, payload: Any) -> None:
        async with self._changed:
            self._command = Command(number, payload)
            self._changed.notify_all()

    async def stop(self) -> None:
        async with self._changed:
            self._stopped = True
            self._changed.notify_all()

    async def next(self, after: int) -> Command | None:
        """The open command if its number is above `after`, else the one that comes; None: nothing more will."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._stopped or (self._command is not None and self._command.number > after)
            )
            return None if self._stopped else self._command

    async def post(self, number: int, kind: str, value: Any) -> None:
        """`kind` is 'epoch' (kept for a restart), 'done' or 'failed' (both close the command)."""
        if self._command is None or self._command.number != number:
            return  # from a worker of a group that is gone, about a command that is closed
        if kind == "epoch":
            self._command = Command(number, self._command.payload, value)
        else:
            self._command = None
        await self._posted.put((kind, value))

    async def take(self) -> tuple[str, Any]:
        """What was posted, in order; waits for it."""
        return await self._posted.get()
