"""Names that a user writes: the nearest known ones for a wrong one, and what an import path names."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from laasp_ray.errors import ConfigError

IMPORT_PATH = "package.module:name"
"""How an import path reads."""


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, prefix: str = "") -> str:
    """`did you mean A?`, or `A or B?`, of the up to `most` nearest of the known names; empty if none is near.

    `prefix` is put before each, where `name` is the last part of what was written.
    """
    close = difflib.get_close_matches(name, list(known), n=most)
    return f"did you mean {' or '.join(prefix + match for match in close)}?" if close else ""


def is_import_path(name: str) -> bool:
    """Whether a name is an import path: what has a colon is."""
    return ":" in name


def imported(path: str, what: str, *, of_any_kind: bool = False) -> Any:
    """The function or class that `path`, such as mypackage.data:MySource, names.

    `what` is the setting that holds the path, for the message. Raises ConfigError where the path names nothing that
    can be imported here, or, unless it may be `of_any_kind`, something that cannot be called.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module can fail in any way
        raise ConfigError(
            f"{what} {path!r} cannot be imported ({type(error).__name__}: {error}); it must read {IMPORT_PATH}, of a "
            "module that Python finds here and on every worker (PYTHONPATH)"
        ) from error
    if not of_any_kind and not callable(found):
        raise ConfigError(f"{what} {path!r} is a {type(found).__name__}, must be a function or a class")
    return found
