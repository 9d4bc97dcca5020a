"""The table, the plot and the rules of a sweep's results."""

import pytest

from laasp_ray.report.sweep import SweepRow, pareto_front, pareto_png, sweep_json, sweep_table
from laasp_ray.sweep.plan import TrialCost, duration
from laasp_ray.sweep.results import best_within, bracket_said, standard_error


def row(name, reduction, top1, before=93.0, **changes):
    values = {
        "name": name,
        "target": f"{reduction:.2%}",
        "folder": f"runs/{name}",
        "status": "finished",
        "flops_reduction": reduction,
        "macs": round(1000 * (1 - reduction)),
        "macs_unpruned": 1000,
        "parameters": 10,
        "parameters_unpruned": 20,
        "latency_ms": (2.0, 2.0 - reduction),
        "top1_before": before,
        "top1_after": top1,
        "seconds": 100.0,
        "shared_seconds": 60.0,
    }
    return SweepRow(**(values | changes))


ROWS = [
    row("a", 0.3, 92.5),
    row("b", 0.4, 92.6),
    row("c", 0.5, 91.0),
    row("d", 0.6, None, status="stopped: why", macs=None, parameters=None),
]


def test_the_best_is_the_deepest_within_the_points_else_the_most_accurate():
    assert best_within(ROWS, 1.0)[0] == "b"
    assert best_within(ROWS, 2.0)[0] == "c"
    assert best_within(ROWS, 0.1) == (
        "b",
        "the largest reduction of FLOPs whose top-1 is at most 0.1 points below that before the first prune; if there "
        "is none, the highest top-1",
    )
    assert best_within([ROWS[3]], 1.0)[0] is None


def test_the_front_has_what_nothing_beats():
    assert [one.name for one in pareto_front(ROWS)] == ["b", "c"]
    assert [one.name for one in pareto_front([row("x", 0.3, 90.0), row("y", 0.3, 90.0)])] == ["x", "y"]


def test_table_and_json_have_every_trial():
    lines = sweep_table(ROWS, "b").splitlines()
    words = "b 40.00% -40.00% 600 10 1.60 of 2.00 93.00% 92.60% 40 s 1 min 00 s best"
    assert lines[3].split() == words.split()
    assert lines[-1].endswith("stopped: why")
    content = sweep_json(ROWS, goal={"kind": "targets"}, rule="r", best="b", said="s", machine="cpu")
    assert content["pareto_front"] == ["b", "c"] and content["trials"][0]["latency_ms"] == (2.0, 1.7)
    assert len(content["trials"]) == 4


def test_the_plot_is_a_picture_with_or_without_latencies():
    for rows in (ROWS, [row("a", 0.3, 92.5, latency_ms=None)], []):
        assert pareto_png(rows, "a", "sweep").startswith(b"\x89PNG")


def test_how_sure_a_bracket_is():
    """Of 10,000 images at 91%, one standard error is the root of 0.91 x 0.09 / 10,000: 0.286 points."""
    assert standard_error(91.0, 10_000) == pytest.approx(0.2862, abs=1e-4)
    rows = {3: row("iteration-003", 0.3, 92.0), 4: row("iteration-004", 0.35, 90.0)}
    said = bracket_said(rows, 3, 9, bar=91.0, base=92.0, points=1.0, images=10_000)
    assert "30.00% of FLOPs (iteration 3 of 9), top-1 92.00%, 1.00 above the bar; iteration 4 is 1.00 below it" in said
    assert said.endswith("one standard error of top-1 on 10,000 test images is 0.29 points")
    near = bracket_said({**rows, 4: row("x", 0.35, 90.9)}, 3, 9, bar=91.0, base=92.0, points=1.0, images=10_000)
    assert near.endswith("so that another seed may choose a neighbour")
    stopped = bracket_said({3: rows[3], 4: ROWS[3]}, 3, 9, bar=91.0, base=92.0, points=1.0, images=10_000)
    assert "iteration 4 was stopped, since it was predicted to end below the bar, and its own end was not" in stopped
    none = bracket_said({1: row("x", 0.02, 90.0)}, 0, 9, bar=91.0, base=92.0, points=1.0, images=10_000)
    assert none.startswith("no reduction is within 1 points of 92.00%: the first iteration already falls below 91.00%")
    predicted = bracket_said({1: ROWS[3]}, 0, 9, bar=91.0, base=92.0, points=1.0, images=10_000)
    assert "the first iteration was stopped, since it was predicted to end below 91.00%; allow" in predicted


def test_the_time_of_a_sweep():
    """The deepest run shares 10, 20 and 30 of its 40 s, and each final training takes 15 s."""
    costs = [TrialCost(f"t{share}", share / 100, 1, float(share), 15.0) for share in (10, 20, 30, 40)]
    assert duration(costs, 1) == 40 + 15 + 3 * 15
    # Beside the deepest, which ends after 55 s, the others begin after 10, 25 and 40 s.
    assert duration(costs, 2) == 55
    assert duration(costs, 4) == 55
    assert duration([], 2) == 0.0
