"""What a page is made of: a run's journal, and beside it the losses of its candidates."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from laasp_ray.errors import StoreError
from laasp_ray.run.events import IterationDone, RunEvent, RunStarted, read_event
from laasp_ray.store.journal import Event, Journal, read_candidates
from laasp_ray.store.storage import Storage

logger = logging.getLogger(__name__)

Proposals = Sequence[tuple[str, str, float]]
"""(layer, criterion, loss) of every proposal of an iteration."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its folder tells it.

    `events` begin with a RunStarted; `times` are when they were written, seconds since 1970 by the driver's clock.
    `candidates` has the proposals of each iteration whose file is there. `attempts` counts the drivers so far.
    """

    name: str
    uri: str
    events: Sequence[RunEvent]
    times: Sequence[float]
    candidates: Mapping[int, Proposals] = field(default_factory=dict)
    attempts: int = 1

    @property
    def start(self) -> RunStarted:
        first = self.events[0]
        assert isinstance(first, RunStarted)
        return first


class RunReader:
    """Reads the run in `storage` again and again; each time only what is new."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._stored: list[Event] = []
        self._events: list[RunEvent] = []
        self._candidates: dict[int, Proposals] = {}

    def read(self) -> RunRecord:
        """Raises StoreError if the folder holds no run, or an event is damaged."""
        uri = self._storage.uri
        for event in Journal(self._storage).events(after=len(self._stored)):
            self._events.append(read_event(event, uri))
            self._stored.append(event)
            self._add_candidates(self._events[-1])
        if not self._events or not isinstance(self._events[0], RunStarted):
            raise StoreError(
                f"{uri} holds no run: give the folder of a run or of a sweep, such as runs/resnet50_digits"
            )
        folder = uri.partition("?")[0].rstrip("/").rpartition("/")[2]
        return RunRecord(
            name=str(self._events[0].config.get("name", folder)),
            uri=uri,
            events=tuple(self._events),
            times=tuple(event.time for event in self._stored),
            candidates=dict(self._candidates),
            attempts=max(1, *(event.attempt for event in self._stored)),
        )

    def _add_candidates(self, event: RunEvent) -> None:
        if not isinstance(event, IterationDone) or not event.candidates:
            return
        try:
            self._candidates[event.iteration] = read_candidates(self._storage, event.iteration)
        except StoreError as error:  # the page says that they are missing
            logger.debug("candidates of iteration %d: %s", event.iteration, error)
