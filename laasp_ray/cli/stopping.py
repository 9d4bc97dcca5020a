"""How a command ends: its exit status, its error line, signals, and characters that a terminal cannot print.

Exit status 0: done. 2: the input is wrong (settings, data, store). 1: the run failed. 130: stopped by Ctrl-C. 143:
stopped by SIGTERM.
"""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from laasp_ray.errors import ConfigError, DataError, LaaspError, StoreError
from laasp_ray.store.addresses import public_text


def guarded(run: Callable[[], None], stopped: str = "stopped; the same command goes on with the run") -> int:
    """Runs a command and returns the exit status. A LaaspError or a stop prints one line on standard error."""
    _replace_what_cannot_be_printed()
    try:
        with _sigterm_as_interrupt() as received:
            run()
    except (ConfigError, DataError, StoreError) as error:
        return _ended(f"error: {error}", 2)
    except LaaspError as error:
        return _ended(f"error: {type(error).__name__}: {error}", 1)
    except KeyboardInterrupt:
        return _ended(stopped, 128 + (received[0] if received else signal.SIGINT))
    return 0


def _ended(line: str, status: int) -> int:
    print(public_text(line), file=sys.stderr)
    return status


def _replace_what_cannot_be_printed() -> None:
    """Makes the output print '?' for a character that the terminal's encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def _sigterm_as_interrupt() -> Iterator[list[int]]:
    """Raises SIGTERM as a KeyboardInterrupt; the yielded list then holds the signal's number.

    Ray's C++ core lets no other exception of a signal handler through.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def raise_it(number: int, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, raise_it)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
