"""Numbers as a page shows them."""

from __future__ import annotations

import datetime
import math

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"
NONE = "\N{EN DASH}"


def short(value: float | None) -> str:
    """`1.23 G`: three figures with a unit of thousands."""
    if value is None:
        return NONE
    for size, unit in _UNITS:
        if abs(value) >= size:
            figures = max(0, 2 - math.floor(math.log10(abs(value) / size)))
            return f"{value / size:.{figures}f} {unit}"
    return f"{value:g}"


def whole(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def percent(share: float | None, digits: int = 2) -> str:
    return NONE if share is None else f"{100 * share:.{digits}f}%"


def change(share: float | None) -> str:
    """A relative change with its sign: 0.25 removed is `−25.00%`."""
    return NONE if share is None else signed(-100 * share, "%")


def signed(value: float, unit: str = "", digits: int = 2) -> str:
    text = f"{abs(value):.{digits}f}"
    sign = "" if float(text) == 0 else MINUS if value < 0 else "+"
    return f"{sign}{text}{unit}"


def loss(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}" if math.isfinite(value) else str(value)


def moment(seconds: float) -> str:
    """A time of day, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def cut(text: str, length: int = 300) -> str:
    """`text`, shortened in the middle if it is longer."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} … {text[-half:]}"
