"""A sweep whose driver is killed again and again has the table and the weights of one that nothing happens to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_pictures

from laasp_ray.store.checkpoint import digest_of

PROGRAM = Path(__file__).with_name("killed_sweep.py")
MEASURED = ("seconds", "shared_seconds", "latency_ms", "folder")


def outcome(folder):
    """What the sweep found, without times and places, and the digests of all networks."""
    stored = json.loads((folder / "sweep.json").read_text())
    rows = [{key: value for key, value in row.items() if key not in MEASURED} for row in stored["trials"]]
    weights = {row["name"]: digest_of((folder / row["name"] / "pruned/model.safetensors").read_bytes()) for row in rows}
    return rows, weights, stored["best"], stored["said"]


@pytest.mark.parametrize(
    ("goal", "kills", "seed"),
    [
        ("targets", 3, 1),
        *(
            pytest.param(goal, 5, seed, marks=pytest.mark.exhaustive)
            for goal in ("targets", "max-drop", "space")
            for seed in (2, 3)
        ),
    ],
)
@pytest.mark.timeout(900)
def test_kills_change_nothing_that_is_found(tmp_path, goal, kills, seed):
    write_pictures(tmp_path / "images", side=8, train=12, test=6)
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, PROGRAM, tmp_path, goal, str(kills), str(seed)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) >= kills - 1
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "peace")
