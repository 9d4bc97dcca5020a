"""The run of docs/own-task.md, as it stands there."""

import importlib
import re
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "own-task.md"
FILES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL))


@pytest.fixture
def names_of(tmp_path, monkeypatch):
    """Runs a script of the page, and gives its names."""
    (tmp_path / "mytask.py").write_text(FILES["mytask.py"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()

    def run(script):
        names: dict[str, object] = {"__name__": "__main__"}
        exec(compile(FILES[script], script, "exec"), names)
        return names

    yield run
    sys.modules.pop("mytask", None)


def test_its_scripts_are_known():
    assert set(FILES) == {"mytask.py", "run.py", "look.py"}


def test_its_iteration_ranks(names_of, capsys):
    best = names_of("look.py")["best"]
    assert best.layer in ("0", "3") and best.images == 40 and str(best.loss) in capsys.readouterr().out


@pytest.mark.exhaustive
def test_its_run_learns_and_prunes(names_of, capsys):
    names = names_of("run.py")
    summary = names["result"].summary
    assert 0.2 <= summary["flops_reduction"] < 0.4
    assert summary["metrics"]["values"]["right"] > 0.6
    assert str(summary["metrics"]["values"]) in capsys.readouterr().out
