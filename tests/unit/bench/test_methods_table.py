"""The rows of the comparison of methods: from the journal, in the file, in the table."""

import dataclasses
import json

import methods_table
import pytest
from methods_table import Row

from laasp_ray.store.journal import Event


def row(method="laasp", target=0.3, seed=0, top1=0.9, loss=0.4, **more):
    values = {
        "top1_before": 0.929,
        "loss_before": 0.25,
        "flops_reduction": 0.31,
        "parameters_reduction": 0.1,
        "parameters": 245_000,
        "iterations": 16,
        "fine_tunes": 5,
        "iteration_seconds": 4.0,
        "epoch_seconds": 10.0,
        "seconds": 164.0,
    }
    return Row(method=method, target=target, seed=seed, top1=top1, loss=loss, **values | more)


def test_a_row_is_what_the_journal_says():
    def training_phase(phase):
        return "training_phase", {"phase": phase, "metrics": {"top1": 0.5, "loss": 2.0}}

    told = [
        ("baseline", {"metrics": {"top1": 0.929, "loss": 0.25}}),
        ("iteration", {"seconds": {"evaluate": 2.0, "total": 3.0}}),
        ("iteration", {"seconds": {"evaluate": 4.0, "total": 5.0}}),
        ("epoch", {"seconds": 8.0}),
        training_phase("fine-tune"),
        ("iteration", {"seconds": {"evaluate": 4.0, "total": 4.0}}),
        ("epoch", {"seconds": 12.0}),
        ("epoch", {"seconds": 10.0}),
        training_phase("final"),
        (
            "finish",
            {
                "metrics": {"top1": 0.9, "loss": 0.4},
                "flops_reduction": 0.31,
                "parameters": 245_000,
                "parameters_unpruned": 250_000,
                "seconds": 45.0,
            },
        ),
    ]
    events = [Event(number, name, data, 0.0) for number, (name, data) in enumerate(told, 1)]
    found = methods_table.row_of("uniform", 0.3, 2, events)
    assert found.parameters_reduction == pytest.approx(0.02)
    expected = row(
        "uniform", seed=2, iterations=3, fine_tunes=1, seconds=45.0, parameters_reduction=found.parameters_reduction
    )
    assert found == expected
    # From scratch the first training is what comes before.
    scratch = methods_table.row_of("uniform", 0.3, 2, [Event(1, *training_phase("train"), 0.0), *events[1:]])
    assert (scratch.top1_before, scratch.loss_before) == (0.5, 2.0)


def test_rows_are_kept_in_the_file_and_others_settings_refused(tmp_path):
    path, rows = tmp_path / "rows.json", [row(), row("l1", 0.5, 1)]
    assert methods_table.read_rows(path, ["a=1"]) == []
    for count in (1, 2):
        methods_table.write_rows(path, "a machine", ["a=1"], rows[:count])
    assert methods_table.read_rows(path, ["a=1"]) == rows
    assert json.loads(path.read_text())["machine"] == "a machine"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(SystemExit, match=r"made with the settings \['a=1'\], these are \[\]"):
        methods_table.read_rows(path, [])


def test_the_table_has_means_and_sample_standard_deviations():
    rows = [
        row(seed=0, top1=0.90, loss=0.40),
        row(seed=1, top1=0.92, loss=0.44, iterations=17, seconds=170.0),
        row("random", top1=0.8, loss=0.7),
        row("random", target=0.5, top1=0.1),
    ]
    lines = methods_table.table(rows, 0.3, ["random", "pls", "laasp"]).splitlines()
    assert lines[0].startswith("| method | seeds | top-1 | loss | FLOPs |")
    assert lines[1] == "|" + "---|" * 11
    # Half of the difference times the square root of two: 1.41 points, and 0.0283.
    assert lines[2:] == [
        "| random | 1 | 80.00% | 0.7000 | -31.00% | -10.00% | 16.0 | 5.0 | 4.0 | 10.0 | 164 |",
        "| laasp | 2 | 91.00% ± 1.41% | 0.4200 ± 0.0283 | -31.00% | -10.00% | 16.5 | 5.0 | 4.0 | 10.0 | 167 |",
        "| before pruning | | 92.90% | 0.2500 | | | | | | | |",
    ]
    assert all(line.count("|") == 12 for line in lines)


def many(method, *values, figure="top1"):
    return [row(method, seed=seed, **{figure: value}) for seed, value in enumerate(values)]


def test_the_verdict():
    def say(rows, figure="top1", ours="laasp"):
        return methods_table.verdict(rows, 0.3, figure, ours, {"laasp", "l1", "uniform"})

    laasp = many("laasp", 0.90, 0.92)  # mean 0.91, spread 0.0141
    assert say([*laasp, *many("l1", 0.89, 0.89)]) == (
        "top1 at 30%: laasp 0.9100 is ahead of the best of 1 others, l1 0.8900: 0.0200 apart, spread 0.0141"
    )
    assert say([*laasp, *many("l1", 0.90, 0.90), *many("uniform", 0.92, 0.92)]) == (
        "top1 at 30%: laasp 0.9100 is tied with the best of 2 others, uniform 0.9200: 0.0100 apart, spread 0.0141"
    )
    assert say([*laasp, *many("l1", 0.90, 0.90)]) == (
        "top1 at 30%: laasp 0.9100 is tied with the best of 1 others, l1 0.9000: 0.0100 apart, spread 0.0141"
    )
    behind = [*laasp, *many("l1", 0.93, 0.93)]
    assert say(behind) == (
        "top1 at 30%: laasp 0.9100 is behind the best of 1 others, l1 0.9300: 0.0200 apart, spread 0.0141"
    )
    assert say(behind, ours="l1") == (
        "top1 at 30%: l1 0.9300 is ahead of the best of 1 others, laasp 0.9100: 0.0200 apart, spread 0.0141"
    )
    # Rows of other targets and of methods that are not compared do not count.
    others = [dataclasses.replace(found, target=0.5) for found in many("l1", 0.99, 0.99)]
    assert say([*laasp, *others, *many("laasp-ema", 0.99)]) == "top1 at 30%: nothing to compare laasp with"


def test_of_losses_the_least_is_best():
    rows = [*many("laasp", 0.40, 0.42, figure="loss"), *many("l1", 0.44, 0.44, figure="loss")]
    assert methods_table.verdict(rows, 0.3, "loss", "laasp", {"laasp", "l1"}) == (
        "loss at 30%: laasp 0.4100 is ahead of the best of 1 others, l1 0.4400: 0.0300 apart, spread 0.0141"
    )
    rows += many("uniform", 0.3, 0.3, figure="loss")
    assert methods_table.verdict(rows, 0.3, "loss", "laasp", {"laasp", "uniform"}) == (
        "loss at 30%: laasp 0.4100 is behind the best of 1 others, uniform 0.3000: 0.1100 apart, spread 0.0141"
    )
