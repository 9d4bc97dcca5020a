"""The mission's command: the main job, submitted to a cluster that was started on this machine."""

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from laasp_ray import load_pruned
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
PORT, DASHBOARD = 6479, 8475

pytestmark = [pytest.mark.job, pytest.mark.timeout(1500)]


@pytest.fixture
def cluster(tmp_path):
    """A head of two CPUs, in the foreground so that stopping it stops this cluster and no other; its environment."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    head = subprocess.Popen(
        [
            RAY,
            "start",
            "--head",
            "--block",
            f"--port={PORT}",
            f"--dashboard-port={DASHBOARD}",
            "--num-cpus=2",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-agent-listen-port={DASHBOARD + 1}",
            "--disable-usage-stats",
        ],
        env=environment,
        stdout=(tmp_path / "head.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 90
        while not _answers(f"http://127.0.0.1:{DASHBOARD}/api/version"):
            assert head.poll() is None and time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(1)
        yield environment
    finally:
        head.terminate()
        head.wait(timeout=60)


def _answers(address):
    try:
        with urllib.request.urlopen(address, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def test_the_submitted_job_prunes_resnet50_to_the_end(cluster, tmp_path):
    command = [
        RAY,
        "job",
        "submit",
        f"--address=http://127.0.0.1:{DASHBOARD}",
        "--working-dir",
        str(ROOT),
        "--",
        sys.executable,
        "jobs/prune_resnet50.py",
        "--storage",
        str(tmp_path / "runs"),
    ]
    done = _submit(command, cluster)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    events = Journal(Storage.open(str(tmp_path / "runs")).child("resnet50_digits")).events()
    finish = events[-1]
    assert finish.name == "finish"
    assert finish.data["flops_reduction"] >= 0.25
    assert sum(event.name == "iteration" for event in events) >= 5
    load_pruned(tmp_path / "runs" / "resnet50_digits")


def _submit(command, environment):
    """Tries again while the head, which answers already, has no agent yet to hand the job to."""
    for _ in range(30):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
        if "No available agent" not in done.stdout + done.stderr:
            break
        time.sleep(2)
    return done


def test_what_is_shipped_leaves_the_environment_and_the_runs_behind():
    ignored = (ROOT / ".rayignore").read_text().split()
    assert {".venv/", "runs/", ".git/"} <= set(ignored)
    assert not re.search(r"^!", "\n".join(ignored), re.MULTILINE)
