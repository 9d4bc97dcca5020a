"""Which driver a run belongs to: attempts that are counted, each taken by writing a file where there was none.

`owner/NNNNNN.json` says who took attempt NNNNNN, and never changes; `owner/NNNNNN.beat` is written anew every few
seconds by that driver, and says when it left. The highest attempt owns the run, so that whoever was stopped and wakes
up finds the next one's file and writes nothing. Clocks are never compared: whether an owner lives is judged by whether
its beat changes while somebody watches it.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from laasp_ray.errors import StoreError
from laasp_ray.store.processes import Process, this_process
from laasp_ray.store.storage import Storage

logger = logging.getLogger(__name__)

BEAT_S = 10.0
"""How often, in seconds, a driver shows that it lives."""
MISSED = 6
"""A driver of which so many beats are missed is taken for dead."""
_FOLDER = "owner/"
_FILE = re.compile(r"^owner/(\d{6,})\.json$")
_POLL = 0.25
"""How often a watcher looks, in beats."""
_living: set[str] = set()
"""The tokens of this process, each as long as its thread beats."""


@dataclass(frozen=True)
class Token:
    """Who took an attempt: `id` is of this one alone, `since` the wall clock's word, `beat_s` how often it beats."""

    id: str
    attempt: int
    process: Process
    since: str
    beat_s: float

    def __str__(self) -> str:
        return f"host {self.process.host}, process {self.process.pid}, since {self.since}"


@dataclass(frozen=True)
class OwnerSeen:
    """What the store tells of a run's owner: its token, the number of its last heartbeat, that driver's own time of it,
    and whether it has released the run.
    """

    token: Token
    beats: int
    at: str
    left: bool


def see_owner(storage: Storage) -> OwnerSeen | None:
    """The owner of the run in `storage`, or None if nobody has taken it. Whether it lives shows if `beats` rises."""
    attempts = _attempts(storage)
    token = _read_token(storage, attempts[-1]) if attempts else None
    if token is None:
        return None
    beat = _read_beat(storage, token.attempt)
    return OwnerSeen(token, int(beat.get("beats", 0)), str(beat.get("at", "")), bool(beat.get("left", False)))


class Owner:
    """This driver's ownership of the run in `storage`. `take` makes one; `release` ends it, and may be called twice."""

    def __init__(self, storage: Storage, token: Token) -> None:
        self.token = token
        self._storage = storage
        self._brief = storage.brief()
        self._beats = 0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="laasp_ray-heartbeat", daemon=True)

    @property
    def attempt(self) -> int:
        return self.token.attempt

    def start(self) -> None:
        """Begins to show that this driver lives."""
        _living.add(self.token.id)
        self._thread.start()

    def ensure(self) -> None:
        """Raises StoreError if another driver has taken the run over: nothing may be written any more."""
        attempts = _attempts(self._storage)
        if attempts and attempts[-1] == self.attempt:
            return
        other = _read_token(self._brief, attempts[-1]) if attempts else None
        raise StoreError(
            f"another driver has taken over the run in {self._storage.uri}"
            f"{'' if other is None else f' ({other})'}: this one (attempt {self.attempt}, {self.token}) had been "
            "silent for too long, stopped or cut off from the store; it has written nothing since and ends here: let "
            "the other go on"
        )

    def release(self) -> None:
        """Lets the run go: the next driver need not wait. A run of which nothing is stored leaves no trace. What goes
        wrong is logged."""
        if self._released.is_set():
            return
        self._released.set()
        _living.discard(self.token.id)
        self._thread.join(timeout=2)
        try:
            if self.attempt == 1 and all(name.startswith(_FOLDER) for name in self._brief.list()):
                _forget(self._brief, self.attempt)
                self._storage.remove_empty(_FOLDER.rstrip("/"))
            else:
                self._write_beat(left=True)
        except StoreError as error:
            logger.warning("the run could not be let go (%s); the next driver will watch for a while first", error)

    def _beat(self) -> None:
        silent = False
        while not self._released.wait(self.token.beat_s):
            try:
                self._write_beat(left=False)
                silent = False
            except Exception as error:  # the thread must outlive whatever the store does
                if not silent:
                    logger.warning("a heartbeat could not be written: %s", error)
                silent = True

    def _write_beat(self, *, left: bool) -> None:
        self._beats += 1
        content = {"id": self.token.id, "beats": self._beats, "at": _clock(), "left": left}
        self._brief.write(_beat_file(self.attempt), json.dumps(content).encode())


def take(storage: Storage, at_least: int = 1, beat_s: float | None = None) -> Owner:
    """Takes the run in `storage`: at once where nobody has it, its owner has left, or was a process of this machine
    that is gone; else after having watched that its heartbeat stands still. The attempt's number is `at_least` that.

    Raises StoreError, naming the owner, if it lives.
    """
    while True:
        attempts = _attempts(storage)
        owner = _read_token(storage, attempts[-1]) if attempts else None
        if owner is not None:
            _check_dead(storage, owner)
        number = max(at_least, attempts[-1] + 1 if attempts else 1)
        token = Token(uuid.uuid4().hex, number, this_process(), _clock(), BEAT_S if beat_s is None else beat_s)
        if not _claimed(storage, token):
            continue
        for old in attempts:
            _forget(storage, old)
        ours = Owner(storage, token)
        ours.start()
        return ours


def _claimed(storage: Storage, token: Token) -> bool:
    """Whether the attempt is this token's now. An answer may be lost, and some stores only let the last one win: what
    is there in the end counts."""
    file = _file(token.attempt)
    try:
        storage.write_new(file, json.dumps(asdict(token)).encode())
    except StoreError:
        if not storage.exists(file):
            raise
    found = _read_token(storage, token.attempt)
    return found is not None and found.id == token.id


def _check_dead(storage: Storage, owner: Token) -> None:
    """Returns once it is known that the owner has left or is dead; raises StoreError if it lives."""
    first = _read_beat(storage, owner.attempt)
    if first.get("left"):
        return
    here = this_process()
    if owner.process.is_here(here):
        ours = owner.process.pid == here.pid and owner.id not in _living
        if ours or not owner.process.exists():
            logger.warning("the driver that had this run is gone (%s): this one takes over", owner)
            return
    patience = MISSED * owner.beat_s
    logger.warning("the run in %s belongs to another driver (%s): is it alive?", storage.uri, owner)
    unchanged, step, looked = 0.0, _POLL * owner.beat_s, time.monotonic()
    while unchanged < patience:
        time.sleep(step)
        beat, now = _read_beat(storage, owner.attempt), time.monotonic()
        if beat.get("left"):
            return
        if beat != first:
            raise StoreError(
                f"another driver has the run in {storage.uri} ({owner}; last heartbeat {beat.get('at', 'unknown')} by "
                "its clock) and it lives: stop that one first, or give this run another --name"
            )
        unchanged += min(now - looked, 2 * step)  # a watcher that was stopped itself has not watched
        looked = now
    logger.warning("that driver gave no sign of life for %.0f s: this one takes over", patience)


def _attempts(storage: Storage) -> list[int]:
    matches = (_FILE.match(file) for file in storage.list(_FOLDER))
    return sorted(int(match.group(1)) for match in matches if match is not None)


def _read_token(storage: Storage, attempt: int) -> Token | None:
    """None if a later driver has cleaned it away; raises StoreError if it is damaged."""
    file = _file(attempt)
    try:
        content = storage.read_json(file)
    except StoreError:
        if storage.exists(file):
            raise
        return None
    try:
        process = Process(**content["process"])
        return Token(
            str(content["id"]), int(content["attempt"]), process, str(content["since"]), float(content["beat_s"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{file} in {storage.uri} is damaged ({error!r}); once you know that no driver runs, remove it"
        ) from error


def _read_beat(storage: Storage, attempt: int) -> Mapping[str, Any]:
    """Empty before the first beat. One that cannot be read is {"damaged": True}."""
    file = _beat_file(attempt)
    try:
        return storage.read_json(file)
    except StoreError:
        if not storage.exists(file):
            return {}
    try:
        return storage.read_json(file)  # the first beat may have come after the first look
    except StoreError:
        return {"damaged": True}


def _forget(storage: Storage, attempt: int) -> None:
    """Removes what an earlier attempt left, the token last; a later attempt may have done so already."""
    for file in (_beat_file(attempt), _file(attempt)):
        try:
            if storage.exists(file):
                storage.delete(file)
        except StoreError as error:
            logger.debug("%s could not be removed: %s", file, error)


def _file(attempt: int) -> str:
    return f"{_FOLDER}{attempt:06d}.json"


def _beat_file(attempt: int) -> str:
    return f"{_FOLDER}{attempt:06d}.beat"


def _clock() -> str:
    """The wall clock, for people to read."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
