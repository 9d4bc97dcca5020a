"""Seconds of work on a device, and how busy the GPU is meanwhile."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any


def seconds_of(work: Callable[[], Any], wait: Callable[[], None], repeats: int = 10, warmup: int = 2) -> float:
    """The median of `repeats`, after `warmup` that do not count. `wait` returns when the device has nothing to do."""
    return alternated([work], wait, repeats, warmup)[0]


def alternated(
    works: Sequence[Callable[[], Any]], wait: Callable[[], None], repeats: int = 10, warmup: int = 2
) -> list[float]:
    """The medians of several works, by turns, so that a drift of the machine favours none."""
    taken: list[list[float]] = [[] for _ in works]
    for turn in range(warmup + repeats):
        for work, seconds in zip(works, taken, strict=True):
            wait()
            began = time.perf_counter()
            work()
            wait()
            if turn >= warmup:
                seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in taken]


class Busy:
    """How much of the time the GPU runs a kernel, by nvidia-smi, ten times a second while the context is open.

    `share` is None where there is no nvidia-smi.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted, self._found = wanted, list[float]()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Busy:
        command = [
            "nvidia-smi",
            "--query-gpu=utilization.gpu",
            "--format=csv,noheader,nounits",
            "-lms",
            "100",
            "-i",
            "0",
        ]
        if self._wanted:
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self._found.append(float(line))

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def share(self) -> float | None:
        return statistics.mean(self._found) / 100 if self._found else None
