"""Settings that were renamed, and settings that may change when a run is resumed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from laasp_ray.config.fields import flatten
from laasp_ray.config.group_sparsity import GroupSparsityConfig
from laasp_ray.config.methods import DEFAULT_METHOD, SECTIONS, keys_of, known_to
from laasp_ray.config.prune import FilterPruneConfig

logger = logging.getLogger(__name__)

RENAMED_KEYS = {
    "prune.recover_every": "prune.fine_tune_every",
    "prune.recover_epochs": "prune.fine_tune_epochs",
    "prune.prunes_per_turn": "prune.prunes_per_iteration",
    "sparsity.group": "prune.group",
    "sparsity.prune": "prune.pruned_per_group",
    "sparsity.fc_prune": "prune.fc_pruned_per_group",
    "sparsity.stages": "prune.stages",
    "sparsity.from_run": "prune.from_run",
}
"""Dotted key of an earlier version -> its current name."""
RESUMABLE_KEYS = (
    "storage",
    "cluster",
    "export",
    "data.path",
    "data.threads",
    "data.workers",
    "data.max_unreadable",
    "search.batch_size",
    "search.candidates_per_task",
    "search.memory_mb",
    "train.test_every",
)
"""Settings that may change when a run is resumed: locations, amounts of resources, settings that change losses only by
rounding, and settings of reports and exports.
"""


def current_name(name: str, renamed: Mapping[str, str]) -> str:
    """The current name of a key or flag. Logs once per process if the name is an old one."""
    if name in renamed:
        _say_renamed(name, renamed[name])
    return renamed.get(name, name)


@functools.cache
def _say_renamed(old: str, new: str) -> None:
    logger.warning("%s is now called %s", old, new)


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config's `to_dict` form with renamed keys under their current names.

    If the old and the new key are both present, the old one stays, and is later refused as unknown. The earlier section
    `sparsity` becomes the section `prune` of method group_sparsity.
    """
    current = {key: dict(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    for old, new in RENAMED_KEYS.items():
        old_section, _, old_key = old.partition(".")
        new_section, _, new_key = new.partition(".")
        part, target = current.get(old_section), current.get(new_section)
        if isinstance(part, dict) and isinstance(target, dict) and old_key in part and new_key not in target:
            current_name(old, RENAMED_KEYS)
            target[new_key] = part.pop(old_key)
    if "sparsity" in current and isinstance(current.get("prune"), dict):
        current["prune"] = _of_one_method(current["prune"], current.pop("sparsity"))
    return current


def _of_one_method(prune: Mapping[str, Any], sparsity: Mapping[str, Any] | None) -> dict[str, Any]:
    """Converts an old config to the section of one method.

    The old `prune` had the keys of all methods, and the old `sparsity` those of group sparsity. Keys of other built-in
    methods had no effect and are dropped.
    """
    _say_renamed("the section sparsity", "prune, with prune.method group_sparsity")
    method = prune.get("method", DEFAULT_METHOD) if sparsity is None else GroupSparsityConfig.method
    # A stored config is read here too, so a method's import path must not be imported.
    keys = keys_of(SECTIONS.get(str(method), FilterPruneConfig))
    own = {key: value for key, value in prune.items() if key in keys} | {"method": method}
    return {key: value for key, value in prune.items() if not known_to(key)} | dict(sparsity or {}) | own


def differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Sorted dotted keys whose values differ between two `to_dict` forms, except those of RESUMABLE_KEYS.

    A key that only one form has always counts, RESUMABLE_KEYS included: another version wrote that form.
    """
    mine, other = flatten(ours), flatten(theirs)
    missing = object()
    return sorted(
        key
        for key in mine.keys() | other.keys()
        if mine.get(key, missing) != other.get(key, missing)
        and not (
            key in mine and key in other and any(key == free or key.startswith(free + ".") for free in RESUMABLE_KEYS)
        )
    )


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The keys that differ (see `differing_keys`) with both values, for an error message; empty if none does."""
    keys = differing_keys(ours, theirs)
    return "; ".join(f"{key}: {value_at(theirs, key)!r} there, {value_at(ours, key)!r} here" for key in keys)


def value_at(data: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key of a `to_dict` form, or None."""
    return flatten(data).get(key)
