"""Mean and spread of several runs, by hand."""

import math
from dataclasses import replace

import pytest
from helpers import small_run

from laasp_ray.report.repeats import collected, figures_of, runs_of, spread_of, table


def figures(top1, loss):
    return {"top1": top1, "top5": 1.0, "loss": loss, "flops_reduction": 0.5}


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
    }
    assert figures_of(summary) == {"top1": 0.75, "top5": 0.9, "loss": 0.5, "flops_reduction": 0.26}


def test_runs_have_names_and_seeds_of_their_own(tmp_path):
    config = small_run(tmp_path, seed=3)
    runs = runs_of(config, 2)
    assert [(run.name, run.seed) for run in runs] == [("small-seed3", 3), ("small-seed4", 4)]
    assert all(replace(run, name=config.name, seed=config.seed) == config for run in runs)


def test_what_is_stored_and_shown():
    content = collected({"net-seed3": figures(0.9, 0.25), "net-seed4": figures(0.8, 0.75)})
    assert content["runs"]["net-seed4"] == figures(0.8, 0.75)
    assert content["spread"]["loss"] == pytest.approx({"mean": 0.5, "std": math.sqrt(0.125), "min": 0.25, "max": 0.75})
    assert content["spread"]["flops_reduction"] == {"mean": 0.5, "std": 0.0, "min": 0.5, "max": 0.5}
    lines = table(content).splitlines()
    assert lines[0].split() == ["top-1", "top-5", "loss", "FLOPs", "reduction"]
    assert [line.split() for line in lines[2:]] == [
        ["net-seed3", "90.00%", "100.00%", "0.2500", "50.00%"],
        ["net-seed4", "80.00%", "100.00%", "0.7500", "50.00%"],
        ["mean", "85.00%", "100.00%", "0.5000", "50.00%"],
        ["std", "7.07%", "0.00%", "0.3536", "0.00%"],
        ["min", "80.00%", "100.00%", "0.2500", "50.00%"],
        ["max", "90.00%", "100.00%", "0.7500", "50.00%"],
    ]
    assert table(collected({"net-seed0": figures(0.9, 0.25)})).splitlines()[4].split() == ["std", "-", "-", "-", "-"]
