"""Pieces of work for the tests of what spreads them over a cluster; workers import this module."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laasp_ray.errors import DataError


@dataclass(frozen=True)
class Killed:
    """Counts 5, and kills its process until `marks` has so many files; then counts 5 more and gives "done"."""

    marks: Path
    times: int

    def steps(self) -> Iterator[Any]:
        yield 5
        begun = len(list(self.marks.iterdir()))
        if begun < self.times:
            (self.marks / str(begun)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield 5
        yield "done"


@dataclass(frozen=True)
class Failing:
    """Raises a DataError."""

    text: str

    def steps(self) -> Iterator[Any]:
        yield 1
        raise DataError(self.text)
