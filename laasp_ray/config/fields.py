"""Converts frozen dataclasses to and from plain dictionaries. Errors name the wrong key or value."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from laasp_ray.config.names import did_you_mean
from laasp_ray.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Doc:
    """One line of help for a config key, with its unit and range: `key: Annotated[int, Doc("...")]`."""

    text: str


def check(holds: bool, key: str, value: object, wanted: str) -> None:
    """Raises ConfigError unless `holds`. The message names the key, its value and what is wanted."""
    if not holds:
        raise ConfigError(f"{key} is {value!r}, must be {wanted}")


def check_types(config: Any, where: str) -> None:
    """Raises ConfigError unless every key of the section `config` has a value of its type, also where it was built in
    Python. `where` is the dotted prefix of its keys. Keys that a user's own subclass adds are left as they are.

    As from a file, a list becomes a tuple and an int a float where these are wanted.
    """
    for key, hint in _hints_of(type(config)).items():  # type: ignore[arg-type]  # a class is hashable
        object.__setattr__(config, key, _convert(hint, _plain(getattr(config, key)), where + key))


@functools.cache
def _hints_of(cls: Any) -> dict[str, Any]:
    """The types of the keys of the package's own class that `cls` is, or is derived from."""
    own = next(base for base in cls.__mro__ if base.__module__.startswith(f"{__package__}."))
    hints = typing.get_type_hints(own)
    return {field.name: hints[field.name] for field in dataclasses.fields(own)}


def _plain(value: Any) -> Any:
    """A number of NumPy and a path as Python's own."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value


def to_plain(value: Any) -> Any:
    """Converts nested dataclasses to dictionaries and tuples to lists, as JSON needs."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def docs(cls: Any) -> dict[str, str]:
    """Every key of the dataclass `cls` that has a Doc -> the text of the Doc."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {
        key: [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Doc)]
        for key, hint in hints.items()
    }
    return {key: items[0].text for key, items in found.items() if items}


def doc_of(cls: Any, key: str) -> str:
    """The Doc text of a dotted key; empty if there is none."""
    first, _, rest = key.partition(".")
    return doc_of(typing.get_type_hints(cls)[first], rest) if rest else docs(cls).get(first, "")


def build(cls: Any, data: Any, where: str) -> Any:
    """Builds the dataclass `cls` from a dictionary. `where` is the dotted prefix of its keys.

    Raises ConfigError for an unknown or missing key or a value of the wrong type. The message names the key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where.rstrip('.') or 'the config'} is {data!r}, must be a mapping")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            hint = did_you_mean(str(key), hints, prefix=where) or f"known: {', '.join(sorted(hints))}"
            raise ConfigError(f"unknown config key {where}{key}; {hint}")
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in data:
            raise ConfigError(f"config key {where}{f.name} is missing")
    return cls(**{key: _convert(hints[key], value, where + key) for key, value in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        check(value in arguments, where, value, f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        check(isinstance(value, (list, tuple)), where, value, "a list")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        check(len(value) == len(arguments), where, value, f"a list of {len(arguments)}")
        pairs = enumerate(zip(arguments, value, strict=True))
        return tuple(_convert(argument, item, f"{where}[{i}]") for i, (argument, item) in pairs)
    if origin is not None:  # Mapping[str, Any]
        check(isinstance(value, Mapping), where, value, "a mapping")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    fits = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    wanted = "a finite number" if hint is float else f"of type {hint.__name__}"
    check(fits and not (isinstance(value, float) and not math.isfinite(value)), where, value, wanted)
    return value
