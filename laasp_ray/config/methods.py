"""The section `prune` of each method: by name for built-in methods, by `config_class` for a user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from laasp_ray.config.fields import build
from laasp_ray.config.group_sparsity import GroupSparsityConfig
from laasp_ray.config.laasp import LaaspConfig
from laasp_ray.config.names import did_you_mean, imported, is_import_path
from laasp_ray.config.pls import PlsConfig
from laasp_ray.config.prune import PruneConfig
from laasp_ray.errors import ConfigError

SECTIONS: Mapping[str, type[PruneConfig]] = {cls.method: cls for cls in (LaaspConfig, PlsConfig, GroupSparsityConfig)}
"""Built-in values of `prune.method` -> the section. Import paths are also allowed."""
DEFAULT_METHOD = LaaspConfig.method


def section_class(method: str) -> type[PruneConfig]:
    """The class of a method's section. A user's own method names it as `config_class` (methods.PruningMethod).

    An import path is imported, so its code runs. Raises ConfigError for an unknown name and for an import path that
    names no method.
    """
    if is_import_path(method):
        section = getattr(imported(method, "prune.method", of_any_kind=True), "config_class", None)
        if not (isinstance(section, type) and issubclass(section, PruneConfig)):
            raise ConfigError(f"prune.method {method!r} must be a subclass of laasp_ray.methods.PruningMethod")
        return section
    if method not in SECTIONS:
        known = f"{did_you_mean(method, SECTIONS)} known: {', '.join(SECTIONS)}".lstrip()
        raise ConfigError(f"prune.method is {method!r}; {known}, or an import path, package.module:Class")
    return SECTIONS[method]


def build_section(data: Any) -> PruneConfig:
    """Builds the section from a dictionary, which names the method. Raises ConfigError as `build` does, and for a key
    of another method.
    """
    if isinstance(data, PruneConfig):
        return data
    method = data.get("method", DEFAULT_METHOD) if isinstance(data, Mapping) else DEFAULT_METHOD
    if not isinstance(method, str):
        raise ConfigError(f"prune.method is {method!r}, must be of type str")
    section = section_class(method)
    for key in data if isinstance(data, Mapping) else ():
        others = [name for name in known_to(key) if key not in keys_of(section)]
        if others:
            raise ConfigError(
                f"prune.{key} is {data[key]!r}, but it is of method {' or '.join(others)}, and this run's is {method}: "
                "leave it out, or set prune.method"
            )
    return build(section, data, "prune.")


def with_method(data: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Converts a section's dictionary to another method. Keys that the other method has too are kept, others are
    dropped.
    """
    keys = keys_of(section_class(method))
    return {key: value for key, value in data.items() if key in keys} | {"method": method}


def known_to(key: str) -> list[str]:
    """The built-in methods whose sections have this key."""
    return [name for name, section in SECTIONS.items() if key in keys_of(section)]


def keys_of(section: type[PruneConfig]) -> set[str]:
    """The keys of a section."""
    return {field.name for field in dataclasses.fields(section)}
