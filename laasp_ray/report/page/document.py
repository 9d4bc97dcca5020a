"""A page as values, and as HTML: one file that refers to nothing else."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from laasp_ray.report.page import numbers
from laasp_ray.store.addresses import public_text

FILE = "report.html"
"""A page's name in the folder of its run or sweep."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A figure of the top: its name, its value now, where it comes from, and the conditions."""

    what: str
    value: str
    before: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture with its title and a text; without a picture the text says why."""

    title: str
    text: str
    svg: Markup | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """`key` is what a column is sorted by, the text if it is None. `bar` is the length of a bar before the text, %."""

    text: str
    key: float | str | None = None
    num: bool = False
    code: bool = False
    bar: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    cells: Sequence[Cell]
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    head: Sequence[Cell]
    rows: Sequence[Row]
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A section below a heading: lines of text, pairs of name and value, pictures, a table, and a folded table."""

    title: str
    lines: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    charts: Sequence[Chart] = ()
    table: Table | None = None
    more: Table | None = None


@dataclass(frozen=True, kw_only=True)
class Document:
    """`lead` are (label, text) of the first lines. `done` says whether there is nothing left to come."""

    heading: str
    kicker: str
    state: str
    done: bool
    lead: Sequence[tuple[str, str]]
    tiles: Sequence[Tile] = ()
    parts: Sequence[Part] = field(default_factory=tuple)


def text(value: str) -> Cell:
    return Cell(text=value)


def name(value: str) -> Cell:
    return Cell(text=value, code=True)


def number(value: str, key: float | None) -> Cell:
    """A number as shown, and as it is sorted; one that is not known comes first."""
    return Cell(text=value, key=-1e300 if key is None else key, num=True)


def heads(*cells: str) -> list[Cell]:
    """Heads of columns; those that begin with '#' are of numbers."""
    return [Cell(text=cell.removeprefix("#"), num=cell.startswith("#")) for cell in cells]


def render(document: Document, now: float) -> str:
    """The HTML. `now` is when it is written, seconds since 1970. Every text is escaped, and addresses in it are without
    credentials.
    """
    written = numbers.moment(now)
    return (
        _environment()
        .get_template("base.html")
        .render(
            title=f"{document.heading}: {document.state}",
            css=Markup(_file("page.css")),
            js=Markup(_file("page.js")),
            footer=f"Written {written} by laasp_ray from the journal. FLOPs are multiply-accumulates of convolutions "
            "and linear layers at one input.",
            **{key: getattr(document, key) for key in document.__dataclass_fields__},
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FunctionLoader(_file),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_public,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _public(value: Any) -> Any:
    """A printed value without credentials. Markup is our own."""
    return public_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _file(file: str) -> str:
    return resources.files("laasp_ray.report.page").joinpath(file).read_text("utf-8")


def duration_between(first: float, last: float) -> str:
    """Wall-clock time between two moments, seconds since 1970: `2:07:31`, with days if there are any."""
    return str(datetime.timedelta(seconds=max(0, round(last - first))))
