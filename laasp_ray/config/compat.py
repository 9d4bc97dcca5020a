"""Which settings may differ between a run's start and its resumption, and which of two configs' do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laasp_ray.config.fields import flatten

RESUMABLE_KEYS = (
    "storage",
    "cluster",
    "data.path",
    "data.threads",
    "data.max_unreadable",
    "search.batch_size",
    "search.candidates_per_task",
    "search.memory_mb",
    "train.test_every",
)
"""Settings that may differ between a run's start and its resumption: where things lie, how much is used, what changes
losses by rounding only, and what is only reported."""


def differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Dotted keys, sorted, whose values differ between two `to_dict` forms, those of RESUMABLE_KEYS left out.

    A key that only one of them has counts, whichever it is: that one was written by another version.
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


def value_at(data: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key of a `to_dict` form, or None."""
    return flatten(data).get(key)
