"""bench/one_shot.py: what it runs by default is known, and what its file has is not made again."""

import json
import sys

import methods
import one_shot
import pytest
from helpers import shared_data


def test_what_runs_by_default_is_known_and_another_name_is_refused(monkeypatch, capsys):
    assert set(one_shot.COMPARED) <= set(methods.METHODS)
    monkeypatch.setattr(sys, "argv", ["one_shot.py", "--data", "data", "--methods", "laasp,pool+obs+c"])
    with pytest.raises(SystemExit):
        one_shot.main()
    assert "unknown: pool+obs+c; known: laasp, l1" in capsys.readouterr().err


def test_rows_say_what_is_gone_and_are_made_once(tmp_path, monkeypatch, capsys):
    data = shared_data("checkpoints/resnet20_epoch130.safetensors").parents[1]
    rows = tmp_path / "rows.jsonl"
    given = f"--data {data} --methods uniform --targets 0.01,0.03 --images 20 --threads 1 --json {rows}".split()
    monkeypatch.setattr(sys, "argv", ["one_shot.py", *given])
    assert one_shot.main() == 0
    before, first, second = found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert (before["gone"], before["top1"], before["iterations"]) == (0, 0.929, 0)
    assert 0.01 <= first["gone"] < 0.03 <= second["gone"] and first["iterations"] < second["iterations"]
    assert {row["method"] for row in found} == {"uniform"} and second["top1"] < 0.929
    assert one_shot.main() == 0
    assert len(rows.read_text().splitlines()) == 3
