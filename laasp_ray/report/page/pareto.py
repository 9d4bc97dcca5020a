"""Accuracy against cost, for the pages of sweeps and of several runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from laasp_ray.report.page.numbers import cut
from laasp_ray.report.page.svg import COLOURS, SERIES, draw
from laasp_ray.report.sweep import SweepRow, comparable, measure_of, pareto_front, score_of, value_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMED = 14
"""Of more runs than that only those of the front have their names in the plot."""
_ROOM = (405.0, 240.0)
"""About the width and the height of the axes."""


def against_flops(rows: Sequence[SweepRow], best: str | None) -> Markup:
    shown = [row for row in comparable(rows) if row.macs_unpruned and row.macs]
    return _plot("pareto-flops", "FLOPs left, % of the unpruned network's", shown, best, _flops_left)


def against_latency(rows: Sequence[SweepRow], best: str | None) -> Markup | None:
    """None if no latency is known."""
    shown = [row for row in comparable(rows) if row.latency_ms is not None]
    if not shown:
        return None
    return _plot("pareto-latency", "median latency, ms", shown, best, lambda row: (row.latency_ms or (0, 0))[1])


def _flops_left(row: SweepRow) -> float:
    return 100 * (row.macs or 0) / (row.macs_unpruned or 1)


def _name(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Writes each point's name beside it, where there is room. A name without room is left out: the table has it."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    places = [((x - left) / (right - left) * _ROOM[0], (y - low) / (high - low) * _ROOM[1]) for _, x, y in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for (name, x, y), (column, line) in zip(points, places, strict=True):
        shown = cut(name, 26)
        wide, tall = 7.0 * len(shown), 13.0
        for side, rise in itertools.product((0.5, 0.0, 1.0), (7.0, -7.0 - tall)):
            begin, base = column - side * wide, line + rise
            box = (begin, base, begin + wide, base + tall)
            inside = box[0] > -8 and box[2] < _ROOM[0] + 8
            if inside and not any(_meet(box, other) for other in taken):
                offset = (begin - column, base - line)
                axes.annotate(shown, (x, y), xytext=offset, textcoords="offset points", size=10, va="bottom", zorder=4)
                taken.append(box)
                break


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _plot(
    name: str, label: str, rows: Sequence[SweepRow], best: str | None, place: Callable[[SweepRow], float]
) -> Markup:
    measure = measure_of(rows)
    ordered = sorted(rows, key=lambda row: (place(row), -score_of(row)))
    front = {row.name for row in pareto_front(ordered, place)}

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        line = [row for row in ordered if row.name in front]
        axes.plot(
            [place(row) for row in line],
            [value_of(row) for row in line],
            color=COLOURS["muted"],
            linewidth=1.2,
            zorder=1,
        )
        for text, chosen, colour, marker, size in (
            ("run", [row for row in ordered if row.name != best], SERIES[0], "o", 40),
            ("best", [row for row in ordered if row.name == best], SERIES[1], "*", 150),
        ):
            if chosen:
                places = [place(row) for row in chosen], [value_of(row) for row in chosen]
                axes.scatter(*places, s=size, color=colour, marker=marker, zorder=3, label=text)
        before = {round(measure.value(row.score_before), 6) for row in rows if row.score_before is not None}
        if len(before) == 1:
            axes.axhline(before.pop(), color=SERIES[2], linestyle=(0, (5, 3)), linewidth=1.2, label="before pruning")
        named = [row for row in ordered if len(ordered) <= _NAMED or row.name in front or row.name == best]
        axes.margins(x=0.16, y=0.22)
        if measure.better == "lower":
            axes.invert_yaxis()  # up is better
        _name(axes, [(row.name, place(row), value_of(row)) for row in named])
        axes.set_xlabel(label)
        axes.set_ylabel(measure.axis)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2, handlelength=1.4)

    return draw(name, f"{measure.title} against {label}, {len(rows)} runs", 330, paint)
