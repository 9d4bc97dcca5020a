"""The run of docs/own-task.md, as it stands there."""

import importlib
import re
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "own-task.md"
FILES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL))


@pytest.mark.exhaustive
def test_its_run_learns_and_prunes(tmp_path, monkeypatch, capsys):
    assert set(FILES) == {"mytask.py", "run.py"}
    (tmp_path / "mytask.py").write_text(FILES["mytask.py"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    try:
        names: dict[str, object] = {"__name__": "__main__"}
        exec(compile(FILES["run.py"], "run.py", "exec"), names)
    finally:
        sys.modules.pop("mytask", None)
    summary = names["result"].summary
    assert 0.2 <= summary["flops_reduction"] < 0.4
    assert summary["metrics"]["values"]["right"] > 0.6
    assert str(summary["metrics"]["values"]) in capsys.readouterr().out
