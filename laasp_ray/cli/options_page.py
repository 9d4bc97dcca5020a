"""Makes docs/options.md from the Docs of the config's fields: `python -m laasp_ray.cli.options_page` writes it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from laasp_ray.cli.flags import FLAGS
from laasp_ray.config import SECTIONS, FilterPruneConfig, PruneConfig, RunConfig
from laasp_ray.config.fields import docs, to_plain
from laasp_ray.config.methods import keys_of

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
    top = [field for field in dataclasses.fields(RunConfig) if not dataclasses.is_dataclass(hints[field.name])]
    parts = [HEAD, "## The run\n", _table(RunConfig, "", [field.name for field in top])]
    for name, hint in hints.items():
        if hint is PruneConfig:
            parts += _of_methods()
        elif dataclasses.is_dataclass(hint):
            parts += _section(f"`{name}`", name, hint)
    return "\n".join(parts)


def _of_methods() -> Iterator[str]:
    """The section `prune`: keys of all methods, keys of methods that remove filters, and each method's own keys."""
    filters = [name for name, section in SECTIONS.items() if issubclass(section, FilterPruneConfig)]
    yield from _section("`prune`, of every method", "prune", PruneConfig)
    title = f"`prune`, of methods that remove filters: {', '.join(filters)}"
    yield from _section(title, "prune", FilterPruneConfig, keys_of(PruneConfig))
    for name, section in SECTIONS.items():
        said = keys_of(FilterPruneConfig if name in filters else PruneConfig)
        yield from _section(f"`prune`, of method {name}", "prune", section, said)


def _section(title: str, name: str, section: Any, said: Collection[str] = ()) -> Iterator[str]:
    """A section's heading, text and table, without the keys in `said`, which an earlier table has."""
    yield f"## {title}\n"
    yield inspect.cleandoc(section.__doc__ or "") + "\n"
    yield _table(section, f"{name}.", [field.name for field in dataclasses.fields(section) if field.name not in said])


def _table(section: Any, prefix: str, keys: Collection[str]) -> str:
    hints, lines = typing.get_type_hints(section), docs(section)
    rows = ["| key | type | default | what |", "|---|---|---|---|"]
    for field in dataclasses.fields(section):
        if field.name in keys:
            key = prefix + field.name
            flags = ", ".join(f"`{flag}`" for flag in _flags(key))
            what = lines.get(field.name, "") + (f" ({flags})" if flags else "")
            cells = (f"`{key}`", _type(hints[field.name]), _default(field), what)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _flags(key: str) -> Iterator[str]:
    yield from sorted(flag for flag, entry in FLAGS.items() if entry.key == key)


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if part is type(None) else _type(part) for part in arguments)
    if origin is tuple:
        many = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        plural = "" if arguments[0] is str or typing.get_origin(arguments[0]) is Literal else "s"
        return f"list of {many}{_type(arguments[0])}{plural}"
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
