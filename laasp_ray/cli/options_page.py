"""docs/options.md from the docs of the config's fields: `python -m laasp_ray.cli.options_page` writes it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from laasp_ray.cli.flags import FLAGS, SPARSITY_FLAGS
from laasp_ray.config import RunConfig
from laasp_ray.config.fields import docs, to_plain

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"
HEAD = """# Options

<!-- Written by `make options` from the config's own fields: change laasp_ray/config/, not this page. -->

Every setting of a run. All go as `--set KEY=VALUE`, the value as JSON (a bare word is a string); those with a flag have
it beside them. A recipe gives the ones that are required, and changes some of the defaults. From Python they are the
fields of `RunConfig` and of its sections.
"""
NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def page() -> str:
    """The whole page, with a newline at its end."""
    hints = typing.get_type_hints(RunConfig)
    top = [field for field in dataclasses.fields(RunConfig) if not _sections(hints[field.name])]
    parts = [HEAD, "## The run\n", _table(RunConfig, "", [field.name for field in top])]
    for name, hint in hints.items():
        for section in _sections(hint):
            about = inspect.cleandoc(section.__doc__ or "")
            parts += [f"## `{name}`\n", about + "\n", _table(section, f"{name}.")]
    return "\n".join(parts)


def _sections(hint: Any) -> list[Any]:
    """The section's classes that a field may hold; none: it is a plain value."""
    return [part for part in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(part)]


def _table(section: Any, prefix: str, keys: list[str] | None = None) -> str:
    hints, lines = typing.get_type_hints(section), docs(section)
    rows = ["| key | type | default | what |", "|---|---|---|---|"]
    for field in dataclasses.fields(section):
        if keys is None or field.name in keys:
            key = prefix + field.name
            flags = ", ".join(f"`{flag}`" for flag in _flags(key))
            what = lines.get(field.name, "") + (f" ({flags})" if flags else "")
            cells = (f"`{key}`", _type(hints[field.name]), _default(field), what)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _flags(key: str) -> Iterator[str]:
    yield from sorted({flag for flag, entry in ({**FLAGS, **SPARSITY_FLAGS}).items() if entry.key == key})


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if part is type(None) else _type(part) for part in arguments)
    if origin is tuple:
        many = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"list of {many}{_type(arguments[0])}" + ("" if arguments[0] is str else "s")
    return NAMES.get(hint, "mapping")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        value = field.default
    return f"`{json.dumps(_rounded(to_plain(value)))}`"


def _rounded(value: Any) -> Any:
    """Numbers as one reads them: four thirds are 1.333 here."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    PAGE.write_text(page())
