"""`laasp-ray status` and `jobs/status.py`: what runs are doing, from their folders alone."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from laasp_ray.cli.stopping import guarded
from laasp_ray.errors import ConfigError, LaaspError, StoreError
from laasp_ray.report.status import RunStatus, status_of, status_text, statuses_table
from laasp_ray.run.events import RunEvent, read_event
from laasp_ray.store.journal import Journal
from laasp_ray.store.ownership import OwnerSeen, see_owner
from laasp_ray.store.storage import Storage
from laasp_ray.sweep.journal import is_sweep, runs_in

LOOKS_PER_BEAT = 4
WATCH_S = 5.0


def status(arguments: Sequence[str] | None = None, prog: str = "status.py") -> int:
    """`laasp-ray status` and `jobs/status.py RUN [--watch]` or `--storage DIR`."""
    parser = argparse.ArgumentParser(
        prog=prog, allow_abbrev=False, description="Says what a run is doing, or lists all runs of a folder."
    )
    parser.add_argument("run", nargs="?", help="the folder of a run or of a sweep, or its s3:// or gs:// address")
    parser.add_argument("--storage", help="list all runs in this folder or address")
    parser.add_argument("--watch", action="store_true", help="go on until the run is finished or Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print JSON")

    def run() -> None:
        options = parser.parse_args(arguments)
        if (options.run is None) == (options.storage is None):
            raise ConfigError("give either a run's folder, or --storage with the folder of all runs")
        if options.watch and (options.run is None or options.json):
            raise ConfigError("--watch shows one run as text: give the run's folder, and not --storage or --json")
        folder = Storage.open(options.storage or options.run)
        if options.watch:
            _watch(folder)
        elif options.run is not None and not is_sweep(folder):
            (found,) = statuses({_name_of(folder): folder})
            print(json.dumps(found.to_dict(), indent=2) if options.json else status_text(found))
        else:
            runs = runs_in(folder)
            found_all = statuses(runs, on_damaged=_say_damaged)
            if options.json:
                print(json.dumps([one.to_dict() for one in found_all], indent=2))
            else:
                print(statuses_table(found_all) if found_all else f"no runs in {options.storage or options.run}")

    return guarded(run, stopped="stopped")


@dataclass(frozen=True)
class _Look:
    """A run's folder as it was read, and what the run is called."""

    name: str
    folder: Storage
    owner: OwnerSeen | None
    events: Sequence[RunEvent]
    attempt: int


def _raise(name: str, error: LaaspError) -> None:
    raise error


def statuses(runs: Mapping[str, Storage], on_damaged: Callable[[str, LaaspError], None] = _raise) -> list[RunStatus]:
    """The status of each run, by what it is called. Looks twice at the heartbeats of those that are not finished, and
    waits in between.

    `on_damaged` gets the name of each that cannot be read, or is no run, with the error; by default it is raised.
    """
    looks = []
    for name, storage in runs.items():
        try:
            looks.append(_look(name, storage.brief()))
        except LaaspError as error:
            on_damaged(name, error)
    last = _looked_again([look.folder for look in looks], [look.owner for look in looks])
    return [
        status_of(look.name, look.folder.uri, look.events, look.attempt, look.owner, now)
        for look, now in zip(looks, last, strict=True)
    ]


def _look(name: str, folder: Storage) -> _Look:
    owner, events = see_owner(folder), Journal(folder).events()
    if owner is None and not events:
        raise StoreError(f"{folder.uri} holds no run: give the folder of a run, such as runs/resnet50_digits")
    attempt = events[-1].attempt if events else 0
    return _Look(name, folder, owner, [read_event(event, folder.uri) for event in events], attempt)


def _name_of(folder: Storage) -> str:
    return folder.uri.rstrip("/").rpartition("/")[2]


def _looked_again(folders: Sequence[Storage], first: Sequence[OwnerSeen | None]) -> list[OwnerSeen | None]:
    """The owners after two heartbeats, or as soon as each has shown another one or has left."""
    seen = list(first)
    waits = [owner.token.beat_s for owner in first if owner is not None and not owner.left]
    if not waits:
        return seen
    step = max(waits) / LOOKS_PER_BEAT
    for _ in range(2 * LOOKS_PER_BEAT):
        waiting = [
            number for number, owner in enumerate(first) if owner and not owner.left and seen[number] == first[number]
        ]
        if not waiting:
            break
        time.sleep(step)
        for number in waiting:
            seen[number] = see_owner(folders[number])
    return seen


def _watch(storage: Storage) -> None:
    """Prints the status again whenever it changes. Raises ConfigError for the folder of a sweep."""
    if is_sweep(storage):
        example = next(iter(runs_in(storage)), "NAME")
        raise ConfigError(
            f"--watch shows one run, and {storage.uri} is a sweep: give the folder of one of its trials, such as "
            f"{storage.child(example).uri}, or leave out --watch to list them"
        )
    before = None
    while True:
        (found,) = statuses({_name_of(storage): storage})
        text = status_text(found)
        # A heartbeat alone is no news.
        news = "\n".join(line for line in text.splitlines() if "last heartbeat" not in line)
        if news != before:
            print(f"{time.strftime('%H:%M:%S')}\n{text}\n", flush=True)
            before = news
        if found.driver == "finished":
            return
        time.sleep(WATCH_S)


def _say_damaged(name: str, error: LaaspError) -> None:
    print(f"{name}: {error}", file=sys.stderr)
