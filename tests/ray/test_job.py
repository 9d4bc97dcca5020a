"""The main job and a sweep, submitted to a cluster that was started on this machine."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_cluster import local_cluster

from laasp_ray import load_pruned
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"

pytestmark = [pytest.mark.job, pytest.mark.timeout(1500)]


@pytest.fixture
def cluster():
    """Two nodes of one CPU, as cluster/local.py brings them up; the environment that it prints."""
    with local_cluster(nodes=2) as environment:
        yield environment


def test_the_submitted_job_prunes_resnet50_to_the_end(cluster, tmp_path):
    done = _submit(["jobs/prune_resnet50.py", "--storage", tmp_path / "runs"], cluster)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    events = Journal(Storage.open(str(tmp_path / "runs")).child("resnet50_digits")).events()
    finish = events[-1]
    assert finish.name == "finish"
    assert finish.data["flops_reduction"] >= 0.25
    assert sum(event.name == "iteration" for event in events) >= 5
    load_pruned(tmp_path / "runs" / "resnet50_digits")


def test_a_submitted_sweep_leaves_a_finished_run_for_each_target(cluster, tmp_path):
    """ResNet-20 on the digits, one worker a run, so that two runs are under way at once."""
    network = ["--set", "model.builder=cifar.resnet20", "--set", 'model.arguments={"num_classes": 10}']
    shorter = ["--epochs", "2", "--prune-epoch", "1", "--calibration-images", "40", "--set", "prune.step=0.03"]
    where = ["--workers", "1", "--storage", tmp_path / "runs", "--name", "sweep"]
    command = ["jobs/sweep_flops.py", "resnet50_digits", *network, *shorter, *where, "--flops-reduction", "0.05", "0.1"]
    done = _submit(command, cluster)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "best (the largest reduction" in done.stdout
    folder = tmp_path / "runs" / "sweep"
    rows = json.loads((folder / "sweep.json").read_text())["trials"]
    assert [(row["name"], row["status"]) for row in rows] == [("flops-0.05", "finished"), ("flops-0.1", "finished")]
    assert rows[0]["shared_seconds"] > 0 and rows[1]["flops_reduction"] >= 0.1
    for row in rows:
        load_pruned(folder / row["name"])


def _submit(job, environment):
    """Tries again while the head, which answers already, has no agent yet to hand the job to."""
    command = [RAY, "job", "submit", "--working-dir", str(ROOT), "--", "python", *map(str, job)]
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
