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
    """At most one command is open at a time; its number rises by one with each.

    A command is handed to rank 0 again after every restart of the group. When that happened `patience` times without an
    epoch being posted, the next loss closes it as failed, with the last complaint.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._command: Command | None = None
        self._stopped = False
        self._deliveries = 0
        self._complaint = "nothing"
        self._changed = asyncio.Condition()
        self._met = asyncio.Event()
        self._posted: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    async def submit(self, number: int, payload: Any) -> None:
        async with self._changed:
            self._command, self._deliveries = Command(number, payload), 0
            self._changed.notify_all()

    async def stop(self) -> None:
        async with self._changed:
            self._stopped = True
            self._changed.notify_all()

    async def met(self) -> None:
        """Returns once a worker has come."""
        await self._met.wait()

    async def next(self, after: int, rank: int) -> Command | None:
        """The open command if its number is above `after`, else the one that comes; None: nothing more will."""
        self._met.set()
        while True:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: self._stopped or (self._command is not None and self._command.number > after)
                )
                if self._stopped:
                    return None
                if rank != 0 or self._deliveries < self._patience:
                    self._deliveries += rank == 0
                    return self._command
            await self._give_up()

    async def complain(self, number: int, text: str) -> None:
        """What a worker says before it dies of an error; the last one, when patience is at its end."""
        self._complaint = text
        if self._command is not None and self._command.number == number and self._deliveries >= self._patience:
            await self._give_up()

    async def _give_up(self) -> None:
        self._command = None
        times = "once" if self._patience == 1 else f"{self._patience} times"
        text = f"the workers were lost {times} without finishing an epoch; the last said: {self._complaint}"
        await self._posted.put(("failed", text))

    async def post(self, number: int, kind: str, value: Any) -> None:
        """`kind` is 'epoch' (kept for a restart), 'done' or 'failed' (both close the command)."""
        if self._command is None or self._command.number != number:
            return  # from a worker of a group that is gone, about a command that is closed
        if kind == "epoch":
            self._command, self._deliveries = Command(number, self._command.payload, value), 1
        else:
            self._command = None
        await self._posted.put((kind, value))

    async def take(self) -> tuple[str, Any]:
        """What was posted, in order; waits for it."""
        return await self._posted.get()
