"""Names that a user writes: suggestions for wrong names, and objects that import paths name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from laasp_ray.errors import ConfigError

IMPORT_PATH = "package.module:name"
"""The form of an import path, for messages."""


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, prefix: str = "") -> str:
    """`did you mean A?` or `A or B?`, with up to `most` known names that are close to `name`; empty if none is close.

    `prefix` is put before each known name. It is the part of the user's text before `name`.
    """
    close = difflib.get_close_matches(name, list(known), n=most)
    return f"did you mean {' or '.join(prefix + match for match in close)}?" if close else ""


def is_import_path(name: str) -> bool:
    """Whether a name is an import path: it contains a colon."""
    return ":" in name


def imported(path: str, what: str, *, of_any_kind: bool = False) -> Any:
    """The function or class that `path` names, such as mypackage.data:MySource.

    `what` is the setting that holds the path, for the message. Raises ConfigError if the path names nothing that can be
    imported here. Also raises it if the object cannot be called, unless `of_any_kind` allows that.
    """
    if not is_import_path(path):  # a plain name would be imported before it is refused
        raise ConfigError(f"{what} {path!r} must read {IMPORT_PATH}")
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module can raise any error
        raise ConfigError(
            f"{what} {path!r} cannot be imported ({type(error).__name__}: {error}); it must read {IMPORT_PATH}, of a "
            "module that Python finds here and on every worker (PYTHONPATH)"
        ) from error
    if not of_any_kind and not callable(found):
        raise ConfigError(f"{what} {path!r} is a {type(found).__name__}, must be a function or a class")
    return found
