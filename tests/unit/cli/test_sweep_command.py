"""`jobs/sweep_flops.py`: what may be asked for, and what is printed."""

import dataclasses
import json

import pytest
from helpers import write_pictures
from whole_runs import on_pictures

from laasp_ray.cli import sweep as command
from laasp_ray.cli.status import status
from laasp_ray.cli.sweep import sweep


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images"), side=8, train=12, test=6)


@pytest.fixture
def tiny(tmp_path, pictures, monkeypatch):
    """The recipe `tiny` is a run of seconds on pictures."""
    config = dataclasses.replace(on_pictures(tmp_path, pictures), name="tiny")
    monkeypatch.setattr(command, "recipe", lambda name, variant: config)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "a sweep needs one target at least, such as --flops-reduction 0.3 0.5"),
        (["--flops-reduction", "0.3", "1.5"], "--flops-reduction 1.5 is no share of FLOPs"),
        (["--flops-reduction", "0.3", "0.3"], "--flops-reduction 0.3 is given twice"),
        (["--max-drop", "1", "--latency-ms", "2"], "--max-drop and --latency-ms ask for two different sweeps"),
        (["--max-drop", "1", "--flops-reduction", "0.1", "0.2"], "--max-drop looks at one trajectory"),
        (["--max-drop", "0"], "--max-drop 0 must be above 0"),
        (["--latency-ms", "2", "--flops-reduction", "0.1"], "leave out --flops-reduction"),
        (["--flops-reduction", "0.1", "--base-top1", "90"], "--base-top1 goes with --max-drop"),
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
    assert "Dry run of the sweep tiny-sweep" in out and "1 runs at a time" in out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("flops-")] == [
        ["flops-0.06", "6.00%"],
        ["flops-0.12", "12.00%"],
    ]
    assert sweep(["tiny", "--max-drop", "20", "--no-ray", "--dry-run", "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    assert "once" in out and "trials" in out and "2 repeats take 2 times as long" in out
    assert not (tiny / "tiny-sweep").exists()
    assert sweep(["tiny", "--latency-ms", "1", "--no-ray", "--dry-run"]) == 2
    assert "--dry-run cannot tell how many prunes" in capsys.readouterr().err


def test_a_sweep_prints_its_table_and_status_lists_its_trials(tiny, capsys):
    assert sweep(["tiny", "--flops-reduction", "0.03", "0.06", "--no-ray"]) == 0
    out = capsys.readouterr().out
    assert "flops-0.03" in out and "best (the largest reduction" in out and "pareto.png" in out
    stored = json.loads((tiny / "tiny-sweep" / "sweep.json").read_text())
    assert [row["status"] for row in stored["trials"]] == ["finished", "finished"]
    assert status([str(tiny / "tiny-sweep")]) == 0
    listed = capsys.readouterr().out
    assert "flops-0.03" in listed and "flops-0.06" in listed


@pytest.mark.exhaustive
def test_repeats_are_sweeps_of_other_seeds(tiny, capsys):
    assert sweep(["tiny", "--flops-reduction", "0.03", "--no-ray", "--repeats", "2"]) == 0
    stored = json.loads((tiny / "tiny-sweep-repeats.json").read_text())
    assert sorted(stored["flops-0.03"]["runs"]) == ["tiny-sweep-seed0", "tiny-sweep-seed1"]
    assert stored["flops-0.03"]["spread"]["top1"]["std"] is not None
    assert "2 sweeps:" in capsys.readouterr().out
