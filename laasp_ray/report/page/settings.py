"""A run's settings beside those of the recipe that it was begun with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laasp_ray.config.compat import with_current_names
from laasp_ray.config.fields import flatten
from laasp_ray.recipes import RECIPES, VARIANTS, recipe
from laasp_ray.store.addresses import names_secret

_OF_A_RUN = ("name", "storage", "data.path")
"""Keys that belong to a run and not to a recipe: they do not say which recipe is meant."""


@dataclass(frozen=True)
class Setting:
    """`recipe` is the recipe's value as text, empty if it has no such key; None if there is nothing to compare with."""

    key: str
    value: str
    recipe: str | None

    @property
    def differs(self) -> bool:
        return self.recipe is not None and self.value != self.recipe


@dataclass(frozen=True)
class Settings:
    """`recipe` names the recipe that is closest to the run's settings: the journal has no name of one. Empty if none
    has the same network and method.
    """

    recipe: str
    rows: Sequence[Setting]

    @property
    def differing(self) -> list[Setting]:
        return [row for row in self.rows if row.differs]


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The settings of a stored config, every key, in its order."""
    ours = {key: _shown(key, value) for key, value in flatten(with_current_names(config)).items()}
    found = {name: theirs for name, theirs in _recipes().items() if _alike(ours, theirs)}
    if not found:
        return Settings("", [Setting(key, value, None) for key, value in ours.items()])
    name = min(found, key=lambda each: (_distance(ours, found[each]), each != config.get("name"), each))
    theirs = {key: found[name].get(key, "") for key in ours if key not in _OF_A_RUN}
    return Settings(name, [Setting(key, value, theirs.get(key)) for key, value in ours.items()])


def _recipes() -> dict[str, dict[str, str]]:
    configs = {name: recipe(name) for name in RECIPES}
    configs |= {f"{name} ({kind})": recipe(name, kind) for kind, names in VARIANTS.items() for name in names}
    return {name: {key: _text(value) for key, value in flatten(one.to_dict()).items()} for name, one in configs.items()}


def _alike(ours: Mapping[str, str], theirs: Mapping[str, str]) -> bool:
    return all(ours.get(key) == theirs.get(key) for key in ("model.builder", "prune.method"))


def _distance(ours: Mapping[str, str], theirs: Mapping[str, str]) -> int:
    keys = (ours.keys() | theirs.keys()) - set(_OF_A_RUN)
    return sum(ours.get(key) != theirs.get(key) for key in keys)


def _shown(key: str, value: Any) -> str:
    """A page is sent on, so what is probably a credential among the arguments of the user's own code is left out."""
    _, inner, name = key.rpartition("arguments.")
    return "***" if inner and names_secret(name) else _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
