"""The page of several runs: which are compared by top-1, and which have none."""

import html
import re

import pytest

from laasp_ray.report.page.several import Compared, comparison_page
from laasp_ray.report.sweep import SweepRow, pareto_front, pareto_png

NOW = 1_800_000_000.0


def row(name, macs, top1, **changes):
    values = {"target": "", "folder": "", "status": "finished", "macs_unpruned": 1000, "latency_ms": (9.0, macs / 100)}
    return SweepRow(name=name, macs=macs, top1_after=top1, **(values | changes))


CLASSES = [row("a", 500, 90.0), row("b", 700, 91.0)]
OWN = row("own", 100, None)
"""A run with a loss of the user's own, and the smallest network."""


def page_of(rows):
    """The page, and its text without style, script and tags."""
    page = comparison_page([Compared(row=one) for one in rows], NOW)
    body = re.sub(r"<(style|script)>.*?</\1>", " ", page, flags=re.DOTALL)
    return page, " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_the_front_goes_by_the_cost_that_is_asked_for():
    rows = [
        row("a", 100, 90.0, latency_ms=(9.0, 3.0)),
        row("b", 200, 89.0, latency_ms=(9.0, 2.0)),
        row("c", 150, 90.0, latency_ms=(9.0, 4.0)),
    ]
    assert [one.name for one in pareto_front(rows)] == ["a"]
    assert [one.name for one in pareto_front(rows, lambda one: one.latency_ms[1])] == ["a", "b"]


def test_a_run_without_a_top1_is_neither_on_the_front_nor_in_a_plot():
    assert [one.name for one in pareto_front([*CLASSES, OWN])] == ["a", "b"]
    page, said = page_of([*CLASSES, OWN])
    assert "On the Pareto front: a, b (" in said
    assert "Not compared by top-1, and so in no plot and on no front: own." in said
    assert page.count(", 2 runs") == 2  # of either plot
    assert "Not compared" not in page_of(CLASSES)[1]


def test_runs_with_a_metric_of_their_own_are_compared_by_it():
    """Of an error lower is better: the axis is upside down, and d is on no front."""
    own = {"metric": "error", "better": "lower", "value_before": 0.25}
    rows = [row("c", 500, None, value_after=0.3, **own), row("d", 700, None, value_after=0.4, **own)]
    page, said = page_of(rows)
    assert "On the Pareto front: c (no other run is as good in error and has at most the FLOPs of these)" in said
    for part in ("Error against FLOPs", "Error against latency", "error before", "0.2500 0.3000 +0.0500"):
        assert part in said, part
    assert page.count(", 2 runs") == 2 and "op-1" not in said
    mixed = page_of([*CLASSES, *rows])[1]
    assert "Not compared by top-1, and so in no plot and on no front: c, d." in mixed and "0.3000" in mixed


def test_runs_that_all_lack_a_top1_are_said_to_have_no_plot():
    page, said = page_of([OWN])
    assert "Pareto plot No finished run was tested." in said and "Pareto front" not in said
    assert "<svg" not in page


@pytest.mark.parametrize("rows", [[OWN], [*CLASSES, OWN]])
def test_a_picture_leaves_out_what_has_no_top1(rows):
    assert pareto_png(rows, None, "sweep").startswith(b"\x89PNG")
    assert pareto_png(rows, None, "sweep") == pareto_png(rows[:-1], None, "sweep")
