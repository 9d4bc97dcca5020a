"""The rows of bench/methods.py as a picture: top-1 against the FLOPs that are gone, a line for each method.

    python bench/methods_plot.py FILE [FILE ...] --out PICTURE.svg [--methods laasp_obs-made_up,laasp,...]

Points are means over a method's seeds, bars the sample standard deviation, where there are several. Lines begin at the
network before pruning.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rcParams
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from methods_table import Row

from laasp_ray.report.repeats import spread_of

NAMES = {
    "laasp_obs-made_up": "LAASP with compensation (the default)",
    "laasp": "LAASP as in the paper",
    "l1": "l1, layers by loss",
    "uniform": "uniform l1",
    "pls": "PLS",
    "random": "random",
    "torch_pruning-group_norm": "torch-pruning, group norm",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="what bench/methods.py wrote with --json")
    parser.add_argument("--out", type=Path, required=True, help="the picture, an SVG")
    parser.add_argument("--methods", default=",".join(NAMES), help="comma-separated, in the order of the legend")
    options = parser.parse_args()
    rows = [Row(**row) for file in options.files for row in json.loads(file.read_text())["rows"]]
    figure = drawn(rows, options.methods.split(","))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # A picture drawn again from the same rows is the same file.
    rcParams["svg.hashsalt"] = "methods"
    FigureCanvasSVG(figure).print_svg(str(options.out), metadata={"Date": None})


def points(rows: Sequence[Row], method: str) -> list[tuple[float, float, float]]:
    """(FLOPs gone, mean top-1, spread) in percent for each target of a method, rising. The spread of one seed is 0."""
    of_target: dict[float, list[Row]] = {}
    for row in rows:
        if row.method == method:
            of_target.setdefault(row.target, []).append(row)
    found = []
    for _, some in sorted(of_target.items()):
        spread = spread_of([row.top1 for row in some])
        gone = statistics.fmean(row.flops_reduction for row in some)
        found.append((100 * gone, 100 * spread.mean, 100 * (spread.std or 0.0)))
    return found


def drawn(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """The picture of the methods that have rows."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    before = 100 * rows[0].top1_before
    axes.axhline(before, color="0.6", linestyle=":", label="before pruning")
    for method in methods:
        found = points(rows, method)
        if found:
            gone, top1, spread = zip((0.0, before, 0.0), *found, strict=True)
            axes.errorbar(gone, top1, yerr=spread, marker="o", capsize=3, label=NAMES.get(method, method))
    axes.set(xlabel="FLOPs gone, %", ylabel="top-1, %", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    return figure


if __name__ == "__main__":
    main()
