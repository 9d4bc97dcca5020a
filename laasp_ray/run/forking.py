"""Begins a run with what another one did until it reached a shallower target.

A run to a deep target passes through all shallower ones: it makes the decisions that a run to one of those would make,
until that target is reached. A fork is a run of its own from there on. It needs nothing of the other run any more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from laasp_ray.config import TARGETS, RunConfig
from laasp_ray.config.compat import differing_keys
from laasp_ray.errors import ConfigError, StoreError
from laasp_ray.records import RunState
from laasp_ray.run.events import IterationDone, RunStarted, read_event
from laasp_ray.run.preflight import open_run, write_config
from laasp_ray.run.state import advance, initial_state
from laasp_ray.store.addresses import public_data
from laasp_ray.store.checkpoint import checkpoint_file, unpruned_file
from laasp_ray.store.journal import Event, Journal, event_file, started_config
from laasp_ray.store.storage import Storage

_MAY_DIFFER = frozenset({"name", *(f"prune.{key}" for key in TARGETS.values()), "prune.iterations"})


def fork(source: Storage, config: RunConfig) -> Storage:
    """Makes the run of `config` from the one in `source`, up to the iteration in which `config`'s targets were reached.

    `config` may differ from the other run's in its name, its storage and its targets. A run of that name that has begun
    is left as it is. It is complete once its first event is there, which is written last. Returns its folder.

    Raises ConfigError if other keys differ or the targets have not been reached, and StoreError if the weights of that
    iteration are not stored any more.
    """
    theirs = started_config(source)
    if theirs is None:
        raise ConfigError(f"there is no run in {source.uri} that {config.name} could begin with")
    keys = [key for key in differing_keys(public_data(config.to_dict()), theirs) if key not in _MAY_DIFFER]
    if keys:
        raise ConfigError(
            f"{config.name} cannot begin with what the run in {source.uri} did: {', '.join(keys)} differ; only its "
            "name, its storage and its targets may"
        )
    _clear(Storage.open(config.storage).child(config.name))
    target = open_run(config)
    if started_config(target) is not None:
        return target
    events, state = _until_reached(Journal(source), config)
    for file in _files(source, events, state):
        target.write(file, source.read(file))
    for event in reversed(events):
        file = event_file(event.sequence, event.name)
        content = source.read_json(file)
        if event is events[0]:
            content["data"]["config"] = public_data(config.to_dict())
        target.write(file, json.dumps(content, separators=(",", ":")).encode())
    write_config(target, config.to_dict())
    return target


def _clear(target: Storage) -> None:
    """Removes the events of a fork that was cut off: they have no first one, and config.json comes after that."""
    files = target.list("journal/")
    if event_file(1, RunStarted.NAME) not in files and not target.exists("config.json"):
        for file in files:
            target.delete(file)


def _until_reached(journal: Journal, config: RunConfig) -> tuple[list[Event], RunState]:
    """The events up to the iteration that reached the targets, and the state after it."""
    events: list[Event] = []
    state = initial_state(config)
    for event in journal.events():
        events.append(event)
        happened = read_event(event, journal.uri)
        state = advance(state, happened, config)
        if isinstance(happened, IterationDone) and config.prune.is_reached(state.reached, state.iteration):
            return events, state
    targets = ", ".join(f"{share:.1%} of {of}" for of, share in config.prune.targets.items())
    raise ConfigError(f"the run in {journal.uri} has not reached the targets of {config.name} ({targets})")


def _files(source: Storage, events: list[Event], state: RunState) -> list[str]:
    """The files that the events tell of and the state needs: the last weights, and all but older weights."""
    needed = checkpoint_file(state.checkpoint)
    if not source.exists(needed):
        raise StoreError(
            f"{needed} in {source.uri} is not stored any more: the run went on; begin this run where it was there"
        )
    told: Mapping[str, Any] = {file: None for event in events for file in event.data.get("digests", {})}
    kept = {needed, unpruned_file()}
    return [
        file
        for file in dict.fromkeys([*told, needed])
        if (file in kept or not _is_checkpoint(file)) and source.exists(file)
    ]


def _is_checkpoint(file: str) -> bool:
    return file.startswith("checkpoints/")
