"""Commands that are stopped, and what they print first and on any terminal."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from laasp_ray.cli import main as cli
from laasp_ray.cli import stopping
from laasp_ray.errors import ConfigError

JOBS = Path(__file__).parents[3] / "jobs"
LINE = "stopped; the same command goes on with the run\n"


@pytest.fixture
def interruptible():
    """As on a terminal: a process that was started in the background may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_says_one_line(capsys, interruptible, number, status):
    closed, before = [], signal.getsignal(signal.SIGTERM)

    def run():
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except Exception:  # being stopped is no failure of a part
            closed.append("swallowed")
        finally:
            closed.append("closed")

    assert stopping.guarded(run) == status
    assert capsys.readouterr().err == LINE and closed == ["closed"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_the_terminals_encoding_lacks_is_replaced(monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def run():
        print("pruned network: /läufe/1/pruned ▇")
        raise ConfigError("no folder /läufe")

    assert stopping.guarded(run) == 2
    out.flush(), err.flush()
    assert out.buffer.getvalue() == b"pruned network: /l?ufe/1/pruned ?\n"
    assert err.buffer.getvalue() == b"error: no folder /l?ufe\n"


def test_the_first_words_are_ours():
    done = subprocess.run([sys.executable, str(JOBS / "prune.py"), "nonsense"], capture_output=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith(b"error: unknown recipe 'nonsense'")
    assert done.stderr.count(b"\n") == 1 and done.stdout == b""


def test_a_cluster_that_is_not_there_is_told_before_the_data_is_looked_for(tmp_path, capsys):
    given = ["--ray-address", "127.0.0.1:9", "--data", str(tmp_path), "--storage", str(tmp_path)]
    for more in ([], ["--dry-run"]):
        assert cli.prune(["resnet20_cifar10", *given, *more]) == 2
        assert capsys.readouterr().err.startswith("error: no Ray cluster could be reached at '127.0.0.1:9': ")
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_with_a_long_path_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 90)))
    assert cli.prune(["resnet20_cifar10", "--data", str(tmp_path), "--storage", str(tmp_path)]) == 2
    assert "set RAY_TMPDIR to a folder with a path of at most" in capsys.readouterr().err
