"""A run's journal: one immutable JSON object per event. An event that is not in it counts as not happened.

Only the driver writes it. `append` detects another driver that writes the same run. This module also stores an
iteration's candidates with their losses, in one Parquet file per iteration: `candidates/NNNNNN.parquet`.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laasp_ray.errors import StoreError
from laasp_ray.records import Ranking, to_json
from laasp_ray.store.storage import Storage

if TYPE_CHECKING:
    import pyarrow

_FOLDER = "journal/"
_FILE = re.compile(r"^journal/(\d{6,})-([a-z][a-z0-9_]*)\.json$")
_NAME = re.compile(r"^[a-z][a-z0-9_]*$")
JOURNAL_VERSION = 2
"""Version 1 had other names for events and keys. It is not supported any more."""
_READERS = 16
REMEDY = "restore it from a copy or start the run under another name"


@dataclass(frozen=True)
class Event:
    """`sequence` counts from 1; `time` is seconds since 1970 on the driver's clock.

    Non-finite floats in `data` are strings ('nan', 'inf', '-inf'), as `records.to_json` writes them.
    """

    sequence: int
    name: str
    data: Mapping[str, Any]
    time: float


class _Data(dict[str, Any]):
    """An event's data as read. A missing key means a damaged file, and the error says so."""

    place = "an event"

    def __missing__(self, key: str) -> Any:
        raise StoreError(f"{self.place} is damaged: it lacks {key!r}; {REMEDY}")


class Journal:
    """The events of the run in `storage`, as `journal/NNNNNN-EVENT.json`.

    The first call that reads the folder determines the last event. After that, every new event must come from this
    object; otherwise `append` raises StoreError.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._written: int | None = None

    @property
    def uri(self) -> str:
        """The run's address, for messages."""
        return self._storage.uri

    def append(self, name: str, data: Mapping[str, Any]) -> Event:
        """Writes the next event and returns it as a reader would see it.

        Raises StoreError if another driver has written to the run since this object first read it, or does so now.
        """
        if not _NAME.match(name):
            raise StoreError(f"{name!r} is no name of an event; use small letters, digits and '_'")
        found = len(self._files())
        if found != self._written:
            raise self._other_driver(f"{found} events where this one left {self._written}")
        sequence, now, values = found + 1, time.time(), to_json(data)
        content = {"schema_version": JOURNAL_VERSION, "sequence": sequence, "name": name, "time": now, "data": values}
        file = _file_name(sequence, name)
        self._storage.write_new(file, json.dumps(content, separators=(",", ":"), allow_nan=False).encode())
        rivals = [other for other in self._storage.list(f"{_FOLDER}{sequence:06d}-") if other != file]
        if rivals:
            self._storage.delete(file)
            raise self._other_driver(f"{rivals[0]} appeared while this one wrote {file}, which was taken back")
        self._written = sequence
        return Event(sequence, name, values, now)

    def events(self) -> list[Event]:
        """All events in order. Raises StoreError, naming the file, for a gap, a duplicate or an unreadable file."""
        files = self._files()
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self._read, files))

    def last(self, name: str) -> Event | None:
        """The latest event of that name, or None. Reads only one file."""
        files = [file for file in self._files() if file.endswith(f"-{name}.json")]
        return self._read(files[-1]) if files else None

    def _files(self) -> list[str]:
        # Names that start with a dot are not events: network filesystems and file managers create such files.
        visible = (file for file in self._storage.list(_FOLDER) if not file.rpartition("/")[2].startswith("."))
        files = sorted(visible, key=_sequence_of)
        for expected, file in enumerate(files, 1):
            if _sequence_of(file) != expected:
                trouble = "a number twice" if _sequence_of(file) < expected else "the one before is missing"
                raise StoreError(
                    f"the journal of {self._storage.uri} is broken at {file}: {trouble} ({expected} "
                    "was due); restore the folder from a copy or start the run under another name"
                )
        if self._written is None:
            self._written = len(files)
        return files

    def _read(self, file: str) -> Event:
        content = self._storage.read_json(file, REMEDY)
        place = f"{file} in {self._storage.uri}"
        try:
            version = content["schema_version"]
            data = _Data(content["data"].items())
            data.place = place
            event = Event(int(content["sequence"]), str(content["name"]), data, float(content["time"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{place} is no event of a journal ({error!r}); {REMEDY}") from error
        if version != JOURNAL_VERSION:
            raise StoreError(
                f"{file} in {self._storage.uri} has schema version {version!r}, this laasp_ray reads "
                f"{JOURNAL_VERSION}: the run was begun by another version; finish it with that one, or start it anew "
                "under another --name"
            )
        if _file_name(event.sequence, event.name) != file:
            raise StoreError(
                f"{file} in {self._storage.uri} holds event {event.sequence} {event.name!r}; "
                "it was renamed or copied there: restore the folder from a copy"
            )
        return event

    def _other_driver(self, seen: str) -> StoreError:
        return StoreError(
            f"another driver writes the run in {self._storage.uri}: {seen}; stop one of them, "
            "or give this run another --name"
        )


def started_config(storage: Storage) -> Mapping[str, Any] | None:
    """The settings in the first event of the run in `storage`, or None if there is no event.

    `config.json` is only a copy for people: it may be lost, or another driver may have written it.
    """
    start = Journal(storage).last("start")
    if start is None:
        return None
    config = start.data.get("config") if isinstance(start.data, Mapping) else None
    if not isinstance(config, Mapping):
        raise StoreError(
            f"journal/{start.sequence:06d}-start.json in {storage.uri} has no config; restore it from a copy or start "
            "the run under another name"
        )
    return config


def _file_name(sequence: int, name: str) -> str:
    return f"{_FOLDER}{sequence:06d}-{name}.json"


def _sequence_of(file: str) -> int:
    match = _FILE.match(file)
    if match is None:
        raise StoreError(f"{file} is no file of a journal (NNNNNN-event.json); remove it from the run's folder")
    return int(match.group(1))


def write_candidates(storage: Storage, iteration: int, ranking: Ranking) -> None:
    """Writes the ranking of `iteration`, one row for each candidate, lowest loss first.

    If the iteration is measured again, its file is replaced.
    """
    import pyarrow
    from pyarrow import parquet

    rows = [
        {
            "rank": rank,
            "layer": entry.layer,
            "criterion": entry.criterion,
            "filters": list(entry.filters),
            "loss": entry.loss,
            "images": entry.images,
            "seconds": entry.seconds,
            "flops_reduction": entry.flops_reduction,
            "dropped_at": entry.dropped_at,
            "error": entry.error,
            "copied": entry.copied,
            "also": [{"layer": layer, "criterion": criterion} for layer, criterion in entry.candidate.also],
        }
        for rank, entry in enumerate(ranking, 1)
    ]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_candidates_schema()), buffer)
    storage.write(_candidates_file(iteration), buffer.getvalue())


def _candidates_schema() -> pyarrow.Schema:
    import pyarrow

    pair = pyarrow.struct([("layer", pyarrow.string()), ("criterion", pyarrow.string())])
    return pyarrow.schema(
        [
            ("rank", pyarrow.int64()),
            ("layer", pyarrow.string()),
            ("criterion", pyarrow.string()),
            ("filters", pyarrow.list_(pyarrow.int64())),
            ("loss", pyarrow.float64()),
            ("images", pyarrow.int64()),
            ("seconds", pyarrow.float64()),
            ("flops_reduction", pyarrow.float64()),
            ("dropped_at", pyarrow.int64()),
            ("error", pyarrow.string()),
            ("copied", pyarrow.string()),
            ("also", pyarrow.list_(pair)),
        ]
    )


def _candidates_file(iteration: int) -> str:
    return f"candidates/{iteration:06d}.parquet"
