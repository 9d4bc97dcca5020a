"""An actor that passes commands from the driver to the trainers, and results from rank 0 to the driver.

It is a separate actor without CPUs, so it outlives the worker group. After a restart the group asks again and gets the
unfinished command with the last finished epoch. Workers wait here and not in a collective, which would time out during
a long search.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command. `resume` is the last epoch that rank 0 posted for it (None: none). The mailbox does not look into
    payloads.
    """

    number: int
    payload: Any
    resume: Any = None


class Mailbox:
    """Holds at most one open command. Every command has the next number.

    The command is given to rank 0 again after every restart of the group. If it was given `patience` times without a
    finished epoch, the next loss of the group closes it as failed, with the last complaint.
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
        """Returns when the first worker has asked for a command."""
        await self._met.wait()

    async def next(self, after: int, rank: int) -> Command | None:
        """Waits for a command with a number above `after` and returns it. None: no more commands come."""
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
        """Records a worker's error before the worker dies. If patience is used up, the command fails with the last
        complaint.
        """
        self._complaint = text
        if self._command is not None and self._command.number == number and self._deliveries >= self._patience:
            await self._give_up()

    async def _give_up(self) -> None:
        self._command = None
        times = "once" if self._patience == 1 else f"{self._patience} times"
        text = f"the workers were lost {times} without finishing an epoch; the last said: {self._complaint}"
        await self._posted.put(("failed", text))

    async def post(self, number: int, kind: str, value: Any) -> None:
        """Posts a result. `kind` is 'epoch' (kept for a restart), 'done' or 'failed' (both close the command)."""
        if self._command is None or self._command.number != number:
            return  # an old group's worker posts for a command that is closed
        if kind == "epoch":
            self._command, self._deliveries = Command(number, self._command.payload, value), 1
        else:
            self._command = None
        await self._posted.put((kind, value))

    async def take(self) -> tuple[str, Any]:
        """Waits for the next posted result, in order."""
        return await self._posted.get()
