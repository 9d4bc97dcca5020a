"""Prepares the next batches in a thread of its own, so that the loop finds them ready."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")

DEPTH = 2
"""The batches that wait, besides the one that is being prepared."""
CPU = torch.device("cpu")
_LOOK_S = 0.1


class _End:
    """What the thread puts last: it ended, or with `error`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _index(device: torch.device) -> int | None:
    """The number of a GPU; that of the calling thread's, if `device` names none."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def fed(batches: Iterator[T], device: torch.device = CPU, *, ahead: bool) -> Generator[T, None, None]:
    """The same `batches`; prepared `ahead` in a thread, or between their uses."""
    if ahead:
        return fed_ahead(batches, device)
    return (batch for batch in batches)


def fed_ahead(batches: Iterator[T], device: torch.device = CPU, depth: int = DEPTH) -> Generator[T, None, None]:
    """The same `batches`, prepared ahead. Raises what they raise. If it is closed early, its thread ends first.

    They are on `device`. A new thread's own GPU is the first of the process, whatever its caller's is.
    """
    gpu = _index(device)
    waiting: queue.Queue[T | _End] = queue.Queue(depth)
    stopped = threading.Event()

    def put(one: T | _End) -> bool:
        """Whether it was put before the reader stopped."""
        while not stopped.is_set():
            try:
                waiting.put(one, timeout=_LOOK_S)
            except queue.Full:
                continue
            return True
        return False

    def prepare() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            for batch in batches:
                if not put(batch):
                    return
        except BaseException as error:  # the reader raises it
            put(_End(error))
        else:
            put(_End(None))

    thread = threading.Thread(target=prepare, name="feeding", daemon=True)
    thread.start()
    try:
        while True:
            one = waiting.get()
            if isinstance(one, _End):
                if one.error is not None:
                    raise one.error
                return
            yield one
    finally:
        stopped.set()
        thread.join()
