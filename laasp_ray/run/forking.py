"""Begins a run with what another one did until it reached a shallower target.

A run to a deep target passes through all shallower ones: it makes the decisions that a run to one of those would make,
until that target is reached. A fork is a run of its own from there on. It needs nothing of the other run any more.

Where a decision may depend on the target (several prunes an iteration, which end when it is reached; a method that is
not built in), the fork begins one iteration earlier and makes the last decision itself. With an exact target the
prunes of laasp and pls depend on it (of laasp already the candidates before the last), so that nothing can be shared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from laasp_ray.config import TARGETS, LaaspConfig, PlsConfig, PruneConfig, RunConfig
from laasp_ray.config.compat import differing_keys, value_at, with_current_names
from laasp_ray.config.names import is_import_path
from laasp_ray.errors import ConfigError, StoreError
from laasp_ray.records import RunState
from laasp_ray.run.events import IterationDone, RunStarted, read_event
from laasp_ray.run.preflight import open_run, write_config
from laasp_ray.run.state import advance, initial_state
from laasp_ray.run.totals import seconds_spent
from laasp_ray.store.addresses import public_data
from laasp_ray.store.checkpoint import RACES, WEIGHTS, checkpoint_file, unpruned_file
from laasp_ray.store.journal import Event, Journal, event_file, started_config
from laasp_ray.store.ownership import take
from laasp_ray.store.storage import Storage

_MAY_DIFFER = frozenset(
    {"name", "train.keep_checkpoints", "prune.iterations", *(f"prune.{key}" for key in TARGETS.values())}
)


def fork(source: Storage, config: RunConfig) -> Storage:
    """Makes the run of `config` from the one in `source`, up to the iteration in which `config`'s targets were reached.

    `config` may differ from the other run's in its name, its storage and its targets. A run of that name that has begun
    is left as it is. It is complete once its first event is there, which is written last. Returns its folder.

    Raises ConfigError if other keys differ, if the other run has no target for a quantity that `config` has one for, or
    if the targets have not been reached. Raises StoreError if the weights of that iteration are not stored any more, or
    another driver has the run of `config`.
    """
    theirs = started_config(source)
    if theirs is None:
        raise ConfigError(f"there is no run in {source.uri} that {config.name} could begin with")
    theirs = with_current_names(theirs)
    _check(config, theirs, source)
    place = Storage.open(config.storage).child(config.name)
    if place.exists(event_file(1, RunStarted.NAME)):
        return open_run(config)
    owner = take(place)
    try:
        _clear(place.guarded(owner.ensure))
        _copy(source, open_run(config).guarded(owner.ensure), config)
        return place
    finally:
        owner.release()


def _check(config: RunConfig, theirs: Mapping[str, Any], source: Storage) -> None:
    if isinstance(config.prune, LaaspConfig | PlsConfig) and config.prune.exact_target:
        raise ConfigError(
            f"{config.name} cannot begin with what the run in {source.uri} did: with prune.exact_target a run to "
            "another target has other prunes; set it to false for both"
        )
    keys = [key for key in differing_keys(public_data(config.to_dict()), theirs) if key not in _MAY_DIFFER]
    if keys:
        raise ConfigError(
            f"{config.name} cannot begin with what the run in {source.uri} did: {', '.join(keys)} differ; only its "
            "name, its storage and its targets may"
        )
    unmeasured = [TARGETS[of] for of in config.prune.targets if not value_at(theirs, f"prune.{TARGETS[of]}")]
    if unmeasured:
        raise ConfigError(
            f"{config.name} has a target for prune.{unmeasured[0]}, which the run in {source.uri} does not measure; "
            "give that run a deeper target for it, too"
        )


def _copy(source: Storage, target: Storage, config: RunConfig) -> None:
    events, state = _until_reached(Journal(source), config)
    for file in _files(source, events, state):
        target.write(file, source.read(file))
    for event in reversed(events):
        file = event_file(event.sequence, event.name)
        content = source.read_json(file)
        if event is events[0]:
            content["data"]["config"] = public_data(config.to_dict())
            happened = [read_event(one, source.uri) for one in events]
            content["data"]["forked"] = {
                "from": source.uri,
                "iteration": state.iteration,
                "events": len(events),
                "seconds": seconds_spent(happened),
            }
        target.write(file, json.dumps(content, separators=(",", ":")).encode())
    write_config(target, config.to_dict())


def _clear(target: Storage) -> None:
    """Removes the events of a fork that was cut off: they have no first one, and config.json comes after that."""
    files = target.list("journal/")
    if event_file(1, RunStarted.NAME) not in files and not target.exists("config.json"):
        for file in files:
            target.delete(file)


def _until_reached(journal: Journal, config: RunConfig) -> tuple[list[Event], RunState]:
    """The events up to the iteration that reached the targets, and the state after them; without that iteration if
    its decision may depend on the targets.
    """
    events: list[Event] = []
    state = initial_state(config)
    for event in journal.events():
        happened = read_event(event, journal.uri)
        after = advance(state, happened, config)
        if isinstance(happened, IterationDone) and config.prune.is_reached(after.reached, after.iteration):
            return (events, state) if decides_by_target(config.prune) else ([*events, event], after)
        events.append(event)
        state = after
    targets = ", ".join(f"{share:.1%} of {of}" for of, share in config.prune.targets.items())
    raise ConfigError(f"the run in {journal.uri} has not reached the targets of {config.name} ({targets})")


def decides_by_target(prune: PruneConfig) -> bool:
    """Whether a decision of the method may depend on the target, so that a fork makes its last one itself.

    Several prunes an iteration end where it is reached.
    """
    return getattr(prune, "prunes_per_iteration", 1) > 1 or is_import_path(prune.method)


def _files(source: Storage, events: list[Event], state: RunState) -> list[str]:
    """The files that the events name, but of the weights only the last ones and the unpruned network's."""
    needed = checkpoint_file(state.checkpoint)
    if not source.exists(needed):
        raise StoreError(
            f"{needed} in {source.uri} is not stored any more: the run went on; begin this run where it was there"
        )
    named = {file for event in events for file in event.data.get("digests", {})} | {needed}
    weights = {needed, unpruned_file(), *state.weights, state.race}
    gone = [file for file in (*state.weights, state.race) if file and not source.exists(file)]
    if gone:
        raise StoreError(f"{gone[0]} in {source.uri} is not stored any more: begin this run where it was there")
    return [
        file
        for file in sorted(named)
        if (file in weights or not file.startswith(("checkpoints/", WEIGHTS, RACES))) and source.exists(file)
    ]
