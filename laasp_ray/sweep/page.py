"""A sweep's page, from its folder: its journal, `sweep.json` once that is there, and the journals of its trials."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from laasp_ray.config.compat import value_at
from laasp_ray.errors import LaaspError, StoreError
from laasp_ray.report.page.document import FILE
from laasp_ray.report.page.several import SweepRecord, sweep_page
from laasp_ray.report.sweep import SweepRow, row_from, row_of_json
from laasp_ray.run.events import RunStarted, read_events
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage
from laasp_ray.sweep.journal import ENDED, FINISHED, STARTED, runs_in
from laasp_ray.sweep.trials import Outcome

logger = logging.getLogger(__name__)


class SweepPage:
    """Writes the page of the sweep in `storage`. What goes wrong is logged, once until it works again: a page never
    ends a sweep.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage, self._troubled = storage.brief(), False

    def write(self) -> None:
        try:
            self._storage.write(FILE, sweep_page(read_sweep(self._storage)).encode())
            self._troubled = False
        except Exception as error:
            if not self._troubled:
                logger.warning("%s of the sweep could not be written, it is tried again later: %s", FILE, error)
            self._troubled = True


def read_sweep(folder: Storage) -> SweepRecord:
    """The sweep in `folder`. Raises StoreError if there is none, or its files are damaged."""
    events = Journal(folder).events()
    if not events or events[0].name != STARTED:
        raise StoreError(f"{folder.uri} holds no sweep: give the folder of one, such as runs/resnet56_cifar10-sweep")
    config, goal = events[0].data["config"], events[0].data["goal"]
    known = {
        "name": str(config.get("name", "sweep")),
        "uri": folder.uri,
        "config": config,
        "goal": goal,
        "began": events[0].time,
        "last": events[-1].time,
    }
    if events[-1].name != FINISHED or not folder.exists("sweep.json"):
        outcomes = {event.data["name"]: event.data["outcome"] for event in events if event.name == ENDED}
        return SweepRecord(rows=_rows(folder, outcomes), **known)
    content = folder.read_json("sweep.json")
    try:
        return SweepRecord(
            rows=[row_of_json(row) for row in content["trials"]],
            finished=True,
            best=content["best"],
            rule=content["rule"],
            said=content["said"],
            machine=content["latency_measured_on"],
            **known,
        )
    except (KeyError, TypeError) as error:
        raise StoreError(f"sweep.json in {folder.uri} is damaged ({error!r}); restore it from a copy") from error


def _rows(folder: Storage, outcomes: Mapping[str, Mapping[str, object]]) -> list[SweepRow]:
    """The rows of a sweep that is under way: the trials that have begun, and those that ended without beginning."""
    runs = runs_in(folder)
    return [_row(name, runs.get(name), outcomes.get(name)) for name in sorted(runs.keys() | outcomes.keys())]


def _row(name: str, place: Storage | None, ended: Mapping[str, object] | None) -> SweepRow:
    outcome = None if ended is None else Outcome.from_json(ended)
    why = "under way" if outcome is None else outcome.error or outcome.stopped or "ended"
    try:
        events = [] if place is None else read_events(Journal(place))
        target = _target(events[0]) if events and isinstance(events[0], RunStarted) else ""
        return row_from(name, events, target=target, folder="" if place is None else place.uri, why=why)
    except LaaspError as error:  # one damaged trial must not hide the others
        return SweepRow(name=name, target="", folder="" if place is None else place.uri, status=str(error))


def _target(start: RunStarted) -> str:
    share = value_at(start.config, "prune.flops_reduction")
    return f"{share:.2%}" if isinstance(share, float) and share else ""
