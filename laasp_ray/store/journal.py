"""A run's journal: one immutable JSON object per event. An event that is not in it counts as not happened.

The driver that owns the run alone writes it; `append` notices another. An event says which attempt wrote it: what an
attempt wrote that had lost the run by then does not count. A last event that was cut off is passed over. Beside it, an
iteration's candidates with their losses, as one Parquet file an iteration: `candidates/NNNNNN.parquet`.
"""

from __future__ import annotations

import io
import json
import logging
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laasp_ray.errors import StoreError
from laasp_ray.records import Ranking, to_json
from laasp_ray.store.checkpoint import digest_of
from laasp_ray.store.ownership import Owner
from laasp_ray.store.storage import Storage

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

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

    Non-finite floats in `data` are strings ('nan', 'inf', '-inf'), as `records.to_json` writes them. `attempt` is that
    of the driver that owned the run (store/ownership.py), 0 where none is known.
    """

    sequence: int
    name: str
    data: Mapping[str, Any]
    time: float
    attempt: int = 0


class _Data(dict[str, Any]):
    """An event's data as read. A missing key means a damaged file, and the error says so."""

    place = "an event"

    def __missing__(self, key: str) -> Any:
        raise StoreError(f"{self.place} is damaged: it lacks {key!r}; {REMEDY}")


class Journal:
    """The events of the run in `storage`, as `journal/NNNNNN-EVENT.json`.

    The first call that looks at the folder fixes what this journal takes to be the last event. From then on every
    event must come from this object, or `append` raises. With an `owner` each event carries its attempt, and `append`
    raises, too, once that one has lost the run.
    """

    def __init__(self, storage: Storage, owner: Owner | None = None) -> None:
        self._storage = storage if owner is None else storage.guarded(owner.ensure)
        self._owner = owner
        self._attempt = 0 if owner is None else owner.attempt
        self._written: int | None = None
        self._torn: str | None = None

    @property
    def uri(self) -> str:
        """The run's address, for messages."""
        return self._storage.uri

    @property
    def owner(self) -> Owner | None:
        """The driver that writes it, if it is known."""
        return self._owner

    def append(self, name: str, data: Mapping[str, Any]) -> Event:
        """Writes the next event and returns it as a reader would see it.

        Raises StoreError if another driver has written to the run since this object first read it, or does so now.
        """
        if not _NAME.match(name):
            raise StoreError(f"{name!r} is no name of an event; use small letters, digits and '_'")
        files = self._without_late(self._files())
        if len(files) != self._written:
            raise self._other_driver(f"{len(files)} events where this one left {self._written}")
        if self._torn is not None:
            logger.warning("%s in %s is removed: it was cut off", self._torn, self.uri)
            self._storage.delete(self._torn)
            self._torn = None
        sequence, now, values = len(files) + 1, time.time(), to_json(data)
        content: dict[str, Any] = {"schema_version": JOURNAL_VERSION, "sequence": sequence, "name": name, "time": now}
        content |= {"attempt": self._attempt, "data": values} if self._attempt else {"data": values}
        file = event_file(sequence, name)
        self._storage.write_new(file, json.dumps(content, separators=(",", ":"), allow_nan=False).encode())
        others = self._storage.list(f"{_FOLDER}{sequence:06d}-")
        rivals = self._without_late([other for other in others if other != file], after=0)
        if rivals:
            self._storage.delete(file)
            raise self._other_driver(f"{rivals[0]} appeared while this one wrote {file}, which was taken back")
        if self._owner is not None:
            self._owner.ensure()
        self._written = sequence
        return Event(sequence, name, values, now, self._attempt)

    def events(self, after: int = 0) -> list[Event]:
        """All events in order, but for the first `after` and a last one that was cut off. Raises StoreError for a gap,
        a duplicate or an unreadable file, naming it."""
        files = self._files()[after:]
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self._read, files))

    def last(self, name: str) -> Event | None:
        """The latest event of that name, or None; reads one or two files only."""
        files = [file for file in self._files() if file.endswith(f"-{name}.json")]
        return self._read(files[-1]) if files else None

    def last_attempt(self) -> int:
        """The attempt of the last event, 0 if there is none or it tells none."""
        files = self._files()
        return self._read(files[-1]).attempt if files else 0

    def _files(self) -> list[str]:
        # Names that start with a dot are not events: network filesystems and file managers create such files.
        visible = (file for file in self._storage.list(_FOLDER) if not file.rpartition("/")[2].startswith("."))
        files = self._of_the_owners(sorted(visible, key=_sequence_of))
        for expected, file in enumerate(files, 1):
            if _sequence_of(file) != expected:
                trouble = "a number twice" if _sequence_of(file) < expected else "the one before is missing"
                raise StoreError(
                    f"the journal of {self._storage.uri} is broken at {file}: {trouble} ({expected} "
                    "was due); restore the folder from a copy or start the run under another name"
                )
        if self._written is None and files and self._is_cut_off(files[-1]):
            self._torn = files[-1]
            logger.warning(
                "%s in %s is empty or cut off: it is passed over, the run stands at the event before",
                self._torn,
                self.uri,
            )
        files = [file for file in files if file != self._torn]
        if self._written is None:
            self._written = len(files)
        return files

    def _of_the_owners(self, files: list[str]) -> list[str]:
        """Of two events of one number those of the later attempt: the other's had lost the run by then."""
        numbers = [_sequence_of(file) for file in files]
        if len(set(numbers)) == len(numbers):
            return files
        kept: list[str] = []
        for file in files:
            if kept and _sequence_of(kept[-1]) == _sequence_of(file):
                before, this = self._attempt_of(kept[-1]), self._attempt_of(file)
                if before != this:
                    kept[-1] = file if this > before else kept[-1]
                    continue
            kept.append(file)
        return kept

    def _without_late(self, files: list[str], after: int | None = None) -> list[str]:
        """`files` without those, numbered beyond `after`, that an attempt wrote which had lost the run by then: the
        owner removes them."""
        beyond = (self._written or 0) if after is None else after
        kept = []
        for file in files:
            late = self._attempt and _sequence_of(file) > beyond and 0 < self._attempt_of(file) < self._attempt
            if not late:
                kept.append(file)
                continue
            logger.warning("%s in %s is removed: its driver had lost the run to this one by then", file, self.uri)
            self._storage.delete(file)
        return kept

    def _attempt_of(self, file: str) -> int:
        try:
            return self._read(file).attempt
        except StoreError:
            return 0

    def _is_cut_off(self, file: str) -> bool:
        """Whether it is no JSON at all, as a power cut or a full disk leaves it."""
        try:
            json.loads(self._storage.read(file))
        except ValueError:
            return True
        except RecursionError:
            return False
        return False

    def _read(self, file: str) -> Event:
        content = self._storage.read_json(file, REMEDY)
        place = f"{file} in {self._storage.uri}"
        try:
            version = content["schema_version"]
            data = _Data(content["data"].items())
            data.place = place
            attempt = int(content.get("attempt", 0))
            event = Event(int(content["sequence"]), str(content["name"]), data, float(content["time"]), attempt)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{place} is no event of a journal ({error!r}); {REMEDY}") from error
        if version != JOURNAL_VERSION:
            raise StoreError(
                f"{file} in {self._storage.uri} has schema version {version!r}, this laasp_ray reads "
                f"{JOURNAL_VERSION}: the run was begun by another version; finish it with that one, or start it anew "
                "under another --name"
            )
        if event_file(event.sequence, event.name) != file:
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


def event_file(sequence: int, name: str) -> str:
    """The file of an event in the run's folder."""
    return f"{_FOLDER}{sequence:06d}-{name}.json"


def _sequence_of(file: str) -> int:
    match = _FILE.match(file)
    if match is None:
        raise StoreError(f"{file} is no file of a journal (NNNNNN-event.json); remove it from the run's folder")
    return int(match.group(1))


def write_candidates(storage: Storage, iteration: int, ranking: Ranking) -> dict[str, str]:
    """Writes the ranking of `iteration`, a row a candidate, least loss first; an iteration measured anew replaces its
    file. Gives the file with its digest."""
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
    return {_candidates_file(iteration): digest_of(buffer.getvalue())}


def read_candidates(storage: Storage, iteration: int) -> list[tuple[str, str, float]]:
    """The (layer, criterion, loss) of every proposal of `iteration`: one for each pair that shares a candidate. Raises
    StoreError if there is no such file or it cannot be read.
    """
    import pyarrow
    from pyarrow import parquet

    file = _candidates_file(iteration)
    raw = storage.read(file)
    try:
        rows = parquet.read_table(io.BytesIO(raw), columns=["layer", "criterion", "loss", "also"]).to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError, KeyError) as error:
        raise StoreError(f"{file} in {storage.uri} is no table of candidates ({error}); {REMEDY}") from error
    return [
        (pair["layer"], pair["criterion"], row["loss"])
        for row in rows
        for pair in ({"layer": row["layer"], "criterion": row["criterion"]}, *(row["also"] or ()))
    ]


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
