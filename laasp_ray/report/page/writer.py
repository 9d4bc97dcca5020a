"""Writes a run's page into its folder while the run goes on, and at its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from laasp_ray.records import RunState
from laasp_ray.report.page.document import FILE
from laasp_ray.report.page.reading import RunReader
from laasp_ray.report.page.run import run_page
from laasp_ray.run.events import BaselineMeasured, EpochDone, Happening, IterationDone, RunFinished, TrainingPhaseDone
from laasp_ray.store.storage import Storage

logger = logging.getLogger(__name__)

EVERY_S = 60.0
"""The least time between two pages of a run under way."""
SHARE = 0.01
"""The most of a run's time that its pages may take."""
_NEWS = (BaselineMeasured, EpochDone, TrainingPhaseDone, IterationDone, RunFinished)


class PageWriter:
    """An observer that writes `report.html`, at most every EVERY_S seconds and in a SHARE of the time. The first page
    comes EVERY_S after the start, the last one with the run's end. `clock` gives seconds.

    What goes wrong is logged, once until it works again: a page never ends a run.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage, self._clock = storage.brief(), clock
        self._reader = RunReader(self._storage)
        self._next = clock() + EVERY_S
        self._is_news = self._troubled = False

    def on_event(self, event: Happening, state: RunState) -> None:
        self._is_news |= isinstance(event, _NEWS)
        if isinstance(event, RunFinished) or (isinstance(event, _NEWS) and self._clock() >= self._next):
            self._write()

    def close(self) -> None:
        """Writes what the last page lacks. It may be called twice."""
        if self._is_news:
            self._write()

    def _write(self) -> None:
        began = self._clock()
        try:
            self._storage.write(FILE, run_page(self._reader.read()).encode())
            self._is_news = self._troubled = False
        except Exception as error:
            if not self._troubled:
                logger.warning("%s could not be written, it is tried again later: %s", FILE, error)
            self._troubled = True
        ended = self._clock()
        self._next = ended + max(EVERY_S, (ended - began) / SHARE)
