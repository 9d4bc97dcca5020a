"""The pictures of a run's page."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from laasp_ray.report.durations import format_duration
from laasp_ray.report.page import numbers
from laasp_ray.report.page.facts import Curves, IterationRow, LayerRow, LossMap, Point
from laasp_ray.report.page.svg import COLOURS, SERIES, WIDTH, draw
from laasp_ray.run.metrics import form_of, label_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW = 15
"""The height of a row that has a name."""
MOST_ROWS = 70
MOST_WINNERS = 20
_LOG_FROM = 20
"""Losses that far apart are drawn on a logarithmic axis."""
_MARKED = 40
"""A line of at most so many points has a mark at each."""
_SCALES = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))
INK, MUTED, BAND, CARD = (COLOURS[name] for name in ("ink", "muted", "band", "card"))


def loss_over_time(curves: Curves) -> Markup:
    return _over_time(curves, "loss", "Loss", lambda point: point.loss)


def metric_over_time(curves: Curves) -> Markup:
    """The primary metric; shares in percent."""
    is_share = form_of(curves.metric).endswith("%}")
    label = label_of(curves.metric)
    return _over_time(
        curves,
        "metric",
        f"{label[0].upper()}{label[1:]}, %" if is_share else label,
        lambda point: math.nan if point.metric is None else (100 if is_share else 1) * point.metric,
    )


def _over_time(curves: Curves, name: str, label: str, value: Callable[[Point], float]) -> Markup:
    size, unit = next((size, unit) for least, size, unit in _SCALES if curves.seconds >= least)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for phase, begin, end in curves.spans:
            if phase in ("prune", "fine-tune"):
                axes.axvspan(begin / size, end / size, color=BAND, linewidth=0)
        for moment in curves.prunes:
            axes.axvline(moment / size, color=SERIES[2], linewidth=1, alpha=0.55, zorder=1)
        for points, colour, text in ((curves.train, SERIES[0], "training"), (curves.test, SERIES[1], "test")):
            known = [point for point in points if math.isfinite(value(point))]
            marker = "o" if len(known) <= _MARKED else None
            if known:
                line = [point.seconds / size for point in known], [value(point) for point in known]
                axes.plot(*line, color=colour, marker=marker, markersize=4, label=text)
        if curves.prunes:
            axes.plot([], [], color=SERIES[2], linewidth=1, label="prune")
        if curves.faults:
            top = [1.0] * len(curves.faults)
            axes.plot(
                [moment / size for moment in curves.faults],
                top,
                "v",
                color=SERIES[3],
                markersize=7,
                clip_on=False,
                transform=axes.get_xaxis_transform(),
                label="fault survived",
            )
        values = [value(point) for point in (*curves.train, *curves.test) if math.isfinite(value(point))]
        if name == "loss" and values and 0 < _LOG_FROM * min(values) < max(values):
            _log(axes)
        axes.set_xlim(0, max(curves.seconds / size, 1e-9))
        axes.set_xlabel(f"{unit} of work")
        axes.set_ylabel(label)
        axes.grid(axis="x", visible=False)
        _legend_above(figure, axes)

    return draw(name, f"{label} of training and test over {unit} of work, with a line at each prune", 290, paint)


def flops_gone(rows: Sequence[IterationRow], target: float | None) -> Markup:
    """The share that each iteration removed, each bar on top of those before."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        numbers_ = [row.number for row in rows]
        bottoms = [100 * row.flops_before for row in rows]
        heights = [100 * (row.flops_reduction - row.flops_before) for row in rows]
        axes.bar(numbers_, heights, bottom=bottoms, width=0.8, color=SERIES[0], linewidth=0)
        if target:
            axes.axhline(100 * target, color=SERIES[1], linewidth=1.5, linestyle=(0, (5, 3)))
            axes.text(
                0.01,
                100 * target,
                f"target {100 * target:g}%",
                va="bottom",
                color=INK,
                transform=axes.get_yaxis_transform(),
                size=11,
            )
        top = max(100 * (target or 0), 100 * rows[-1].flops_reduction)
        axes.set_ylim(0, max(1.18 * top, 1e-3))
        axes.set_xlim(numbers_[0] - 0.6, numbers_[-1] + 0.6)
        _whole_ticks(axes.xaxis)
        axes.set_xlabel("iteration")
        axes.set_ylabel("FLOPs gone, %")
        axes.grid(axis="x", visible=False)

    gone = numbers.percent(rows[-1].flops_reduction)
    return draw("flops", f"FLOPs gone after each of {len(rows)} iterations: {gone} at the end", 290, paint)


def winners(won: Mapping[str, Counter[str]]) -> Markup:
    """How many prunes each layer had, by the criterion that chose them."""
    shown = dict(itertools.islice(won.items(), MOST_WINNERS))
    criteria = [name for name, _ in sum(won.values(), Counter()).most_common()]
    colours, others = dict(zip(criteria, SERIES, strict=False)), set(criteria[len(SERIES) :])

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        names = list(shown)
        starts = [0] * len(names)
        groups: list[tuple[str, list[int], str]] = [
            (criterion, [shown[name][criterion] for name in names], colour) for criterion, colour in colours.items()
        ]
        if others:
            groups.append(("others", [sum(shown[name][each] for each in others) for name in names], MUTED))
        for criterion, counts, colour in groups:
            total = sum(layer[criterion] for layer in won.values()) if criterion != "others" else sum(counts)
            axes.barh(names, counts, left=starts, color=colour, label=f"{criterion} ({total})", height=0.75)
            starts = [start + count for start, count in zip(starts, counts, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("prunes")
        axes.tick_params(axis="y", length=0, labelsize=11)
        axes.margins(y=0.02)
        axes.grid(axis="y", visible=False)
        _whole_ticks(axes.xaxis)
        _legend_above(figure, axes)

    height = max(200, 110 + 20 * len(shown))
    return draw("winners", "Prunes of each layer, by the criterion that chose them", height, paint)


def widths(layers: Sequence[LayerRow]) -> Markup:
    """The filters of every layer, before and now."""
    shown = layers[:MOST_ROWS]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        names = [layer.name for layer in shown]
        axes.barh(names, [layer.filters for layer in shown], color=COLOURS["band"], height=0.8, label="before")
        axes.barh(names, [layer.kept for layer in shown], color=SERIES[0], height=0.8, label="now")
        axes.invert_yaxis()
        axes.margins(y=0.3 / max(1, len(names)))
        axes.set_xlabel("filters")
        axes.tick_params(axis="y", length=0, labelsize=10)
        axes.grid(axis="y", visible=False)
        _whole_ticks(axes.xaxis)
        _legend_above(figure, axes)

    return draw("widths", f"Filters of {len(shown)} layers, before and now", max(200, 90 + _ROW * len(shown)), paint)


def heat_map(found: LossMap) -> Markup:
    """The least loss of each layer's candidates, above the least of the iteration; high ones are all drawn alike."""
    import numpy as np

    values = np.array(found.rises, dtype=float)
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(np.quantile(finite, 0.9))
    high = high if high > low else low + 1e-9
    every = math.ceil(len(found.layers) / MOST_ROWS)

    def paint(figure: Figure) -> None:
        grid = figure.add_gridspec(2, 1, height_ratios=[_ROW * len(found.layers) + 1, 12])
        axes, scale = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
        axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="none")
        rows, columns = [row for row, _ in found.chosen], [column for _, column in found.chosen]
        size = max(3.0, min(36.0, 600 / len(found.iterations)))
        axes.scatter(columns, rows, s=size, color="#ffffff", edgecolors="#111111", linewidths=0.8)
        axes.set_yticks(range(0, len(found.layers), every), found.layers[::every], fontsize=10)
        positions = _spread(len(found.iterations), 10)
        axes.set_xticks(positions, [str(found.iterations[position]) for position in positions])
        axes.set_xlabel("iteration")
        axes.tick_params(axis="y", length=0)
        ramp = np.linspace(low, high, 64)[None, :]
        scale.imshow(ramp, aspect="auto", cmap="viridis", extent=(low, high, 0, 1), interpolation="none")
        scale.set_yticks([])
        scale.set_xlabel("loss above the iteration's least")
        for each in (axes, scale):
            each.grid(visible=False)
            each.spines[:].set_visible(False)
        scale.locator_params(axis="x", nbins=5)

    rows_height = max(120, _ROW * math.ceil(len(found.layers) / every))
    return draw("heat", "Least loss of each layer's candidates in each iteration", rows_height + 110, paint)


def seconds(parts: Mapping[str, float]) -> Markup:
    """Where the time went."""
    total = sum(parts.values())

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        names = list(parts)
        colours = [
            SERIES[0] if name.startswith("training") else SERIES[2] if name.startswith("iter") else SERIES[1]
            for name in names
        ]
        axes.barh(names, list(parts.values()), color=colours, height=0.7)
        for number, spent in enumerate(parts.values()):
            text = f"{format_duration(spent)} ({spent / total:.0%})"
            axes.annotate(text, (spent, number), xytext=(5, 0), textcoords="offset points", va="center", size=11)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.45 * max(parts.values()))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelsize=11)
        axes.grid(visible=False)

    return draw("seconds", "Seconds of work by kind", max(110, 30 + 26 * len(parts)), paint)


def _legend_above(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = max(1, WIDTH // (7 * max(map(len, labels)) + 45))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.2, columnspacing=1.2)


def _log(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _whole_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _spread(count: int, most: int) -> list[int]:
    step = max(1, math.ceil(count / most))
    return list(range(0, count, step))
