"""Mean and spread of several runs, by hand."""

import math
from dataclasses import replace

import pytest
from helpers import small_run

from laasp_ray.report.repeats import collected, figures_of, runs_of, spread_of, table


def figures(top1, loss, best=1.0):
    return {"top1": top1, "best_top1": best, "top5": 1.0, "loss": loss, "flops_reduction": 0.5}


def without_best(run):
    return {figure: value for figure, value in run.items() if figure != "best_top1"}


def test_spread_by_hand():
    # Deviations -1, 0, 4 and -3 from the mean 3: 26 / 3 is the sample variance.
    spread = spread_of([2.0, 3.0, 7.0, 0.0])
    assert (spread.mean, spread.min, spread.max) == (3.0, 0.0, 7.0)
    assert spread.std == pytest.approx(math.sqrt(26 / 3))


def test_one_value_has_no_spread():
    spread = spread_of([0.25])
    assert (spread.mean, spread.std, spread.min, spread.max) == (0.25, None, 0.25, 0.25)
    with pytest.raises(ValueError, match="no values"):
        spread_of([])


def test_the_figures_are_those_of_the_pruned_network():
    summary = {
        "metrics": {"loss": 0.5, "top1": 0.75, "top5": 0.9, "images": 360},
        "flops_reduction": 0.26,
        "macs": 740000,
        "best": {"epoch": 7, "metrics": {"loss": 0.625, "top1": 0.8125, "top5": 0.95, "images": 360}},
    }
    expected = {"top1": 0.75, "best_top1": 0.8125, "top5": 0.9, "loss": 0.5, "flops_reduction": 0.26}
    assert figures_of(summary) == expected
    assert figures_of(summary | {"best": None}) == without_best(expected)


def own_summary(right, best, **values):
    """A run with a loss of the user's own and the metric `right`, if that is given."""

    def metrics(value):
        values_of = {} if value is None else {"right": value, **values}
        return {"loss": 0.5, "top1": None, "top5": None, "images": 10, "values": values_of, "better": "higher"}

    return {"metrics": metrics(right), "best": {"epoch": 7, "metrics": metrics(best)}, "flops_reduction": 0.25}


def test_the_user_s_own_metrics_are_figures_by_their_names():
    summary = own_summary(0.75, 0.875, error=12.5)
    assert list(figures_of(summary).items()) == [
        ("right", 0.75),
        ("best_right", 0.875),
        ("error", 12.5),
        ("loss", 0.5),
        ("flops_reduction", 0.25),
    ]
    assert figures_of(own_summary(None, None)) == {"loss": 0.5, "best_loss": 0.5, "flops_reduction": 0.25}
    lines = table(collected({"net": figures_of(summary)})).splitlines()
    assert lines[0].split() == ["right", "best", "right", "error", "loss", "FLOPs", "reduction"]
    assert lines[2].split() == ["net", "0.7500", "0.8750", "12.5000", "0.5000", "25.00%"]


def test_runs_have_names_and_seeds_of_their_own(tmp_path):
    config = small_run(tmp_path, seed=3)
    runs = runs_of(config, 2)
    assert [(run.name, run.seed) for run in runs] == [("small-seed3", 3), ("small-seed4", 4)]
    assert all(replace(run, name=config.name, seed=config.seed) == config for run in runs)


def test_what_is_stored_and_shown():
    runs = {"net-seed3": figures(0.9, 0.25, 0.95), "net-seed4": figures(0.8, 0.75, 0.85)}
    content = collected(runs)
    assert content["runs"]["net-seed4"] == figures(0.8, 0.75, 0.85)
    assert content["spread"]["loss"] == pytest.approx({"mean": 0.5, "std": math.sqrt(0.125), "min": 0.25, "max": 0.75})
    assert content["spread"]["best_top1"]["mean"] == pytest.approx(0.9)
    assert content["spread"]["flops_reduction"] == {"mean": 0.5, "std": 0.0, "min": 0.5, "max": 0.5}
    lines = table(content).splitlines()
    assert lines[0].split() == ["top-1", "best", "top-1", "top-5", "loss", "FLOPs", "reduction"]
    assert [line.split() for line in lines[2:]] == [
        ["net-seed3", "90.00%", "95.00%", "100.00%", "0.2500", "50.00%"],
        ["net-seed4", "80.00%", "85.00%", "100.00%", "0.7500", "50.00%"],
        ["mean", "85.00%", "90.00%", "100.00%", "0.5000", "50.00%"],
        ["std", "7.07%", "7.07%", "0.00%", "0.3536", "0.00%"],
        ["min", "80.00%", "85.00%", "100.00%", "0.2500", "50.00%"],
        ["max", "90.00%", "95.00%", "100.00%", "0.7500", "50.00%"],
    ]
    # Runs that end with pruning have no final epochs.
    lines = table(collected({name: without_best(run) for name, run in runs.items()})).splitlines()
    assert lines[0].split() == ["top-1", "top-5", "loss", "FLOPs", "reduction"]
    assert lines[2].split() == ["net-seed3", "90.00%", "100.00%", "0.2500", "50.00%"]
    alone = table(collected({"net-seed0": figures(0.9, 0.25)})).splitlines()
    assert alone[4].split() == ["std", "-", "-", "-", "-", "-"]
