"""Sweeps with data, loss and metrics of the user's own: compared by the first metric, whichever values are better."""

import dataclasses
import json

import pytest
from fakes import Silent
from own_examples import config_of
from whole_runs import read_events_of

from laasp_ray.cli.sweep import sweep as command
from laasp_ray.errors import ConfigError
from laasp_ray.records import Metrics
from laasp_ray.report.sweep import SweepRow, comparable, pareto_front, pareto_png, row_of_json, sweep_table
from laasp_ray.run.events import RunFinished, last_of
from laasp_ray.run.metrics import TOP1, Measure
from laasp_ray.sweep import directors, in_process, results
from laasp_ray.sweep.directors import BELOW, BracketDirector
from laasp_ray.sweep.goals import MaxDrop, Targets, check_goal
from laasp_ray.sweep.plan import dry_run
from laasp_ray.sweep.run import run_sweep
from laasp_ray.sweep.trials import Outcome
from laasp_ray.tasks import CLASSIFICATION, OutputLossTask, task_of

IOU, ERROR = Measure("mIoU"), Measure("error", "lower")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(in_process, "_progress", lambda trial: Silent())


def sweep(config, goal, **options):
    return run_sweep(config, goal, distributed=False, say=lambda line: None, **options)


def test_what_a_task_is_compared_by(tmp_path):
    of_own = task_of(config_of(tmp_path))
    wrong_first = dict(reversed(of_own.metrics_by_name.items()))
    tasks = (CLASSIFICATION, of_own, dataclasses.replace(of_own, metrics_by_name=wrong_first), OutputLossTask(loss=max))
    assert [task.primary for task in tasks] == [
        ("top1", "higher"),
        ("right", "higher"),
        ("wrong", "lower"),
        ("loss", "lower"),
    ]


def test_scores_are_higher_for_the_better_network():
    own = Metrics(loss=0.5, images=10, values={"error": 0.25}, better="lower")
    assert Measure.of(own) == ERROR and ERROR.score(own) == -0.25 and ERROR.text(-0.25) == "error 0.2500"
    alone = Metrics(loss=0.5, images=10, better="lower")
    assert Measure.of(alone) == Measure("loss", "lower") and Measure.of(alone).score(alone) == -0.5
    classes = Metrics(loss=0.5, top1=0.875, top5=1.0, images=8)
    assert Measure.of(classes) == TOP1 and TOP1.score(classes) == 87.5 and TOP1.text(87.5) == "top-1 87.50%"
    assert IOU.within(0.02, "the base's") == "whose mIoU is at most 0.02 worse than the base's"


def row(name, after, flops, measure=ERROR, before=0.25):
    return SweepRow(
        name=name,
        target=f"{flops:.2%}",
        folder=name,
        status="finished",
        flops_reduction=flops,
        macs=int(1000 * (1 - flops)),
        macs_unpruned=1000,
        metric=measure.name,
        better=measure.better,
        value_before=before,
        value_after=after,
    )


ROWS = [row("a", 0.20, 0.1), row("b", 0.26, 0.2), row("c", 0.40, 0.3), row("d", 0.50, 0.25)]


def test_the_best_row_by_an_error_is_the_deepest_that_is_not_much_worse():
    assert results.best_within(ROWS, 0.0)[0] == "a"
    best, rule = results.best_within(ROWS, 0.02)
    assert best == "b" and "whose error is at most 0.02 worse than that before the first prune" in rule
    assert "the lowest error" in rule and results.best_within(ROWS, 1.0)[0] == "c"
    worse = [row(name, value, 0.1) for name, value in (("x", 0.9), ("y", 0.7))]
    assert results.best_within(worse, 0.1)[0] == "y"


def test_the_front_and_the_table_of_an_error():
    assert [one.name for one in pareto_front(ROWS)] == ["a", "b", "c"]  # d is worse than c in both
    table = sweep_table(ROWS, "b").splitlines()
    assert "error before" in table[0] and "0.2500" in table[2] and "0.2600" in table[3]
    assert pareto_png(ROWS, "b", "sweep")[:4] == b"\x89PNG"


def test_rows_of_another_metric_are_not_compared():
    other = row("e", 0.9, 0.4, IOU)
    assert [one.name for one in comparable([*ROWS, other])] == ["a", "b", "c", "d"]


def test_a_row_is_read_again_from_sweep_json():
    assert row_of_json(json.loads(json.dumps(dataclasses.asdict(ROWS[0])))) == ROWS[0]


def director_of(monkeypatch, tmp_path, points):
    """That of ten iterations, with an error of 0.25 before the first prune."""
    config = config_of(tmp_path)
    before = Metrics(loss=0.5, images=10, values={"error": 0.25}, better="lower")
    monkeypatch.setattr(directors, "base_metrics", lambda run: before)
    monkeypatch.setattr(directors, "reductions_of", lambda run: [0.01 * number for number in range(1, 11)])
    monkeypatch.setattr(directors, "has_pruned", lambda run: True)
    monkeypatch.setattr(directors, "has_begun", lambda run: False)
    return BracketDirector(config, MaxDrop(points), 1, config.cluster, lambda name, outcome: None, {})


def test_a_bracket_by_an_error(monkeypatch, tmp_path):
    director = director_of(monkeypatch, tmp_path, 0.1)
    assert director.measure == ERROR and director.bar == pytest.approx(-0.35)
    director.ended("iteration-004", Outcome(score=-0.34, curve=(-0.40, -0.34)))
    director.ended("iteration-006", Outcome(score=-0.36, curve=(-0.42, -0.36)))
    assert director.results == {4: True, 6: False}
    # The finished trials gained 0.06 after the first epoch, and half of the drop more is allowed: 0.35 + 0.06 + 0.05.
    assert (
        director.stop_reason("iteration-005", [-0.47]) == BELOW and director.stop_reason("iteration-005", [-0.45]) == ""
    )


def test_what_a_bracket_by_an_error_says():
    rows = {1: ROWS[0], 2: ROWS[1], 3: ROWS[2]}
    said = results.bracket_said(rows, 2, 3, bar=-0.35, base=-0.25, points=0.1, images=10, measure=ERROR)
    assert said == (
        "the largest reduction with error at most 0.1 worse than 0.2500: 20.00% of FLOPs (iteration 2 of 3), error "
        "0.2600, 0.0900 below the bar; iteration 3 is 0.0500 above it; how much error varies with the 10 test examples "
        "is not known"
    )


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (MaxDrop(0.0), r"--max-drop 0 must be above 0, in the unit of error"),
        (MaxDrop(float("nan")), r"--max-drop nan must be above 0, in the unit of error"),
        (MaxDrop(0.1, base_top1=90.0), r"--base-top1 is of top-1, and this task's networks are compared by error"),
    ],
)
def test_goals_that_do_not_fit_the_metric(tmp_path, goal, message):
    with pytest.raises(ConfigError, match=message):
        check_goal(goal, config_of(tmp_path), 10, ERROR)
    check_goal(MaxDrop(500.0), config_of(tmp_path), 10, ERROR)  # an error may be counted in anything


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("sweep"), prune__exact_target=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_process, "_progress", lambda trial: Silent())
        return config, sweep(config, Targets((0.1, 0.3)))


def test_a_sweep_over_targets(finished):
    config, result = finished
    assert [one.metric for one in result.rows] == ["right", "right"] and all(one.is_finished for one in result.rows)
    for one in result.rows:
        run = dataclasses.replace(config, name=one.name, storage=f"{config.storage}/{config.name}")
        assert one.value_after == last_of(read_events_of(run), RunFinished).metrics.values["right"]
    assert (result.best is not None and "% of FLOPs gone, right 0." in result.said) or "right 1." in result.said
    assert "whose right is at most 0 worse than that before the first prune" in result.content["rule"]
    assert result.content["trials"][0]["metric"] == "right" and result.content["pareto_front"]


def test_a_bracket_of_a_whole_sweep(tmp_path):
    config = config_of(tmp_path, prune__exact_target=False)
    result = sweep(config, MaxDrop(0.5))
    assert all(one.metric == "right" for one in result.rows) and "with right at most 0.5 worse than" in result.said
    assert "whose right is at most 0.5 worse than the base's" in result.content["rule"]


def test_a_dry_run_and_its_refusals(tmp_path):
    plan = dry_run(config_of(tmp_path), MaxDrop(0.1), distributed=False)
    assert "nothing is trained" in plan
    with pytest.raises(ConfigError, match="--base-top1 is of top-1, and this task's networks are compared by right"):
        dry_run(config_of(tmp_path), MaxDrop(0.1, base_top1=90.0), distributed=False)
    with pytest.raises(ConfigError, match=r"data\.factory is 'given': the run's was a Python object"):
        dry_run(config_of(tmp_path, data__factory="given"), MaxDrop(0.1), distributed=False)


def test_the_command_takes_a_recipe_with_a_task_and_its_repeats_have_the_metric(tmp_path, capsys):
    arguments = ["own_examples:recipe_of_own", "--flops-reduction", "0.1", "--no-ray", "--storage", str(tmp_path)]
    assert command([*arguments, "--name", "own", "--repeats", "2", "--set", 'export.format="none"']) == 0
    said = capsys.readouterr().out
    assert "right before" in said and "the highest right" in said and "top-1" not in said
    content = json.loads((tmp_path / "own-repeats.json").read_text())
    assert set(content["flops-0.1"]["spread"]) == {"right", "flops_reduction"}
    (one, other) = content["flops-0.1"]["runs"].values()
    assert 0 <= one["right"] <= 1 and 0 <= other["right"] <= 1


def test_the_command_refuses_a_base_of_top1(tmp_path, capsys):
    arguments = ["own_examples:recipe_of_own", "--no-ray", "--storage", str(tmp_path)]
    assert command([*arguments, "--max-drop", "0.1", "--base-top1", "90"]) != 0
    assert "--base-top1 is of top-1, and this task's networks are compared by right" in capsys.readouterr().err
