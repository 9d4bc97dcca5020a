"""The time that something is waited for, and when to say so again."""

from __future__ import annotations

import time
from collections.abc import Callable

SAY_S = 60.0
"""The driver says what it waits for after so many seconds, and again as often."""


class Waiting:
    """A wait that has begun."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or (lambda: time.monotonic())
        self.restart()

    def restart(self) -> None:
        """What was waited for has come: the wait begins anew."""
        self._began = self._said = self._clock()

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return self._clock() - self._began

    def has_to_be_said(self) -> bool:
        """Whether SAY_S have passed since this was true, or since the beginning."""
        now = self._clock()
        if now - self._said <= SAY_S:
            return False
        self._said = now
        return True
