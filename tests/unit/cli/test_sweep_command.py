"""`jobs/sweep_flops.py`: what may be asked for, and what is printed."""

import dataclasses
import json
import re

import pytest
from helpers import small_run, write_pictures
from whole_runs import on_pictures

from laasp_ray.cli import sweep as command
from laasp_ray.cli.status import status
from laasp_ray.cli.sweep import sweep
from laasp_ray.errors import ConfigError
from laasp_ray.report.sweep import SweepRow
from laasp_ray.sweep import plan
from laasp_ray.sweep.run import SweepResult


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images"), side=8, train=12, test=6)


@pytest.fixture
def tiny(tmp_path, pictures, monkeypatch):
    """The recipe `tiny` is a run of seconds on pictures."""
    config = dataclasses.replace(on_pictures(tmp_path, pictures), name="tiny")
    monkeypatch.setattr(command, "recipe", lambda name: config)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "a sweep needs one target at least, such as --flops-reduction 0.3 0.5"),
        (["--flops-reduction", "0.3", "1.5"], "--flops-reduction 1.5 is no share of FLOPs"),
        (["--flops-reduction", "0.3", "0.3"], "--flops-reduction 0.3 is given twice"),
        (["--max-drop", "1", "--latency-ms", "2"], "--max-drop and --latency-ms ask for two different sweeps"),
        (["--max-drop", "1", "--flops-reduction", "0.1", "0.2"], "--max-drop looks at one trajectory"),
        (["--flops-reduction", "0.1", "--set", "prune.exact_target=true"], "prune.exact_target is of a run by itself"),
        (["--max-drop", "0"], "--max-drop 0 must be above 0"),
        (["--latency-ms", "2", "--flops-reduction", "0.1"], "leave out --flops-reduction"),
        (["--flops-reduction", "0.1", "--base-top1", "90"], "--base-top1 goes with --max-drop"),
        (["--flops-reduction", "0.1", "--trials", "3"], "--trials goes with --space"),
        (["--max-drop", "1", "--best-within", "3"], "--best-within chooses one of several targets: --max-drop says"),
        (["--latency-ms", "1", "--best-within", "3"], "--latency-ms says itself which is the best"),
        (["--flops-reduction", "0.1", "--space", "nowhere.yaml"], "--space nowhere.yaml: there is no such file"),
        (["--flops-reduction", "0.99"], "at most 0.9"),
    ],
)
def test_what_cannot_be_asked_for_is_told(tiny, capsys, given, message):
    assert sweep(["tiny", *given, "--no-ray"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tiny.rglob("*start.json"))


def test_the_plan_says_what_is_shared_and_stores_nothing(tiny, capsys):
    assert sweep(["tiny", "--flops-reduction", "0.06", "0.12", "--no-ray", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Dry run of the sweep tiny-sweep" in out and "1 run at a time, of 1 worker each" in out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("flops-")] == [
        ["flops-0.06", "6.00%"],
        ["flops-0.12", "12.00%"],
    ]
    assert sweep(["tiny", "--max-drop", "20", "--no-ray", "--dry-run", "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    assert "once" in out and "trials" in out and "2 repeats take 2 times as long" in out
    assert not (tiny / "tiny-sweep").exists()
    assert sweep(["tiny", "--latency-ms", "1000", "--no-ray", "--dry-run"]) == 2
    assert "ms already; ask for less" in capsys.readouterr().err


def test_a_latency_is_planned_as_if_it_fell_with_flops(tiny, capsys, monkeypatch):
    monkeypatch.setattr(plan, "to_go", lambda config, ms: (5.0, 0.12))
    assert sweep(["tiny", "--latency-ms", "4.5", "--no-ray", "--dry-run"]) == 0
    lines = {line.partition("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "5.00 ms here, of which 12.0% is to go" in lines["latency"]
    assert re.search(r"about [3-9] iterations if the latency falls as FLOPs do", lines["trajectory"])
    assert not (tiny / "tiny-sweep").exists()


def test_a_sweep_prints_its_table_and_status_lists_its_trials(tiny, capsys):
    assert sweep(["tiny", "--flops-reduction", "0.03", "0.06", "--no-ray"]) == 0
    out = capsys.readouterr().out
    assert "flops-0.03" in out and "best (the largest reduction" in out and "pareto.png" in out
    stored = json.loads((tiny / "tiny-sweep" / "sweep.json").read_text())
    assert [row["status"] for row in stored["trials"]] == ["finished", "finished"]
    assert status([str(tiny / "tiny-sweep")]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert listed == ["flops-0.03", "flops-0.06"]
    assert status(["--storage", str(tiny)]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert listed == ["tiny-sweep/flops-0.03", "tiny-sweep/flops-0.06"]
    assert status([str(tiny / "tiny-sweep"), "--watch"]) == 2
    said = capsys.readouterr().err
    assert "tiny-sweep is a sweep: give the folder of one of its trials, such as" in said and "flops-0.03, or" in said


@pytest.mark.exhaustive
def test_repeats_are_sweeps_of_other_seeds(tiny, capsys):
    assert sweep(["tiny", "--flops-reduction", "0.03", "--no-ray", "--repeats", "2"]) == 0
    stored = json.loads((tiny / "tiny-sweep-repeats.json").read_text())
    assert sorted(stored["flops-0.03"]["runs"]) == ["tiny-sweep-seed0", "tiny-sweep-seed1"]
    assert stored["flops-0.03"]["spread"]["top1"]["std"] is not None
    assert stored["best"]["runs"] == stored["flops-0.03"]["runs"]
    assert "2 sweeps:" in capsys.readouterr().out


def test_repeats_of_a_search_have_the_mean_of_its_answers(tiny, capsys, monkeypatch):
    """The answers of two seeds are other iterations; a third has none."""
    answers = {"tiny-sweep-seed0": ("iteration-003", 90.0, 0.3), "tiny-sweep-seed1": ("iteration-005", 91.0, 0.5)}

    def swept(config, goal, options):
        name, top1, gone = answers.get(config.name, ("", 0.0, 0.0))
        rows = [
            SweepRow(name=one, target="-", folder="-", status="finished", flops_reduction=gone, top1_after=top1)
            for one in (name, "iteration-001")
        ]
        return SweepResult("", tuple(rows), name or None, "", {})

    monkeypatch.setattr(command, "_run", swept)
    assert sweep(["tiny", "--max-drop", "20", "--no-ray", "--repeats", "3"]) == 0
    stored = json.loads((tiny / "tiny-sweep-repeats.json").read_text())
    assert list(stored) == ["best"] and sorted(stored["best"]["runs"]) == sorted(answers)
    assert stored["best"]["spread"]["flops_reduction"]["mean"] == pytest.approx(0.4)
    assert stored["best"]["spread"]["top1"]["mean"] == pytest.approx(0.905)
    assert "1 of 3 sweeps found no best one" in capsys.readouterr().out


def test_trials_are_timed_at_their_ends_only_if_that_is_asked_for(tmp_path, monkeypatch):
    seen = []

    def stop(config, goal, **_):
        seen.append(config.export.latency)
        raise ConfigError("enough")

    monkeypatch.setattr(command, "recipe", lambda name: small_run(tmp_path, export__latency=["eager"]))
    monkeypatch.setattr(command, "run_sweep", stop)
    for more in ([], ["--set", 'export.latency=["compile"]']):
        assert sweep(["tiny", "--flops-reduction", "0.1", "--no-ray", *more]) == 2
    assert seen == [(), ("compile",)]
