"""Bars for work that is counted: live on a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich import progress
from rich.console import Console

from laasp_ray.report.durations import format_duration

_PARTS = 10
_MEGABYTE = 1e6


class TerminalBars:
    """Shows a bar with the count and the time that is left, on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)

    @contextlib.contextmanager
    def bar(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        columns = ("{task.description}", progress.BarColumn(), "{task.fields[shown]}", progress.TimeRemainingColumn())
        with progress.Progress(*columns, console=self._console) as shown:
            task, done = shown.add_task(what, total=total, shown=_share(0, total, unit)), 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                shown.update(task, completed=done, shown=_share(done, total, unit))

            yield advance


class LineBars:
    """Prints a line whenever another tenth is done, with the time since the start. `clock` gives seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock

    @contextlib.contextmanager
    def bar(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        started, done, shown = self._clock(), 0, 0

        def advance(count: int) -> None:
            nonlocal done, shown
            done += count
            tenths = _PARTS * done // total if total else _PARTS
            if tenths > shown:
                shown = tenths
                passed = format_duration(self._clock() - started)
                print(f"{what}: {_share(done, total, unit)}, {passed}", file=self._stream, flush=True)

        yield advance


def make_bars(stream: TextIO | None = None) -> TerminalBars | LineBars:
    """Live bars if `stream` (standard error) is a terminal, else lines."""
    stream = sys.stderr if stream is None else stream
    return TerminalBars(stream) if stream.isatty() else LineBars(stream)


def _share(done: int, total: int, unit: str) -> str:
    if unit == "bytes":
        return f"{done / _MEGABYTE:,.1f} of {total / _MEGABYTE:,.1f} MB"
    return f"{done:,} of {total:,} {unit}"
