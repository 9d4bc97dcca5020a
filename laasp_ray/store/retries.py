"""Calls on a storage, repeated with growing pauses while it does not answer: for minutes, and no longer."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from laasp_ray.errors import LaaspError
from laasp_ray.store.faults import fault_of

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""How long a run waits for a storage that fails in a way that may pass."""
BRIEF_S = 15.0
"""How long that is where waiting helps nobody: before a run starts, in a heartbeat, for TensorBoard's files."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 15.0
_Result = TypeVar("_Result")


def retried(
    call: Callable[[], _Result], place: str, patience_s: float, hide: Callable[[str], str] = lambda text: text
) -> _Result:
    """What `call` gives. Errors that may pass are met with another try, until `patience_s` seconds are over.

    The first of them is logged, without what `hide` takes out, and so is the end of the trouble.
    """
    began, pause = time.monotonic(), _FIRST_PAUSE_S
    troubled = False
    while True:
        try:
            result = call()
        except Exception as error:
            left = began + patience_s - time.monotonic()
            if isinstance(error, LaaspError) or not fault_of(error).transient or left <= 0:
                raise
            if not troubled:
                logger.warning(
                    "%s does not answer as it should (%s): trying again for up to %.0f s",
                    place,
                    hide(first_line(error)),
                    patience_s,
                )
            troubled = True
            time.sleep(min(left, pause * random.uniform(0.5, 1.0)))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            continue
        if troubled:
            logger.warning("%s answers again, after %.1f s", place, time.monotonic() - began)
        return result


def first_line(error: BaseException) -> str:
    """An error's text without the pages that some clients add below."""
    return (str(error).splitlines() or [type(error).__name__])[0]
