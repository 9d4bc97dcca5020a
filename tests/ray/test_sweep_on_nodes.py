"""A sweep whose trials are spread over two nodes. Trainers on GPUs need real ones: sharing them is not tried here."""

import json
import os
import subprocess
import sys

import pytest
from helpers import write_pictures
from local_cluster import local_cluster

pytestmark = [pytest.mark.ray, pytest.mark.exhaustive, pytest.mark.timeout(900)]

SCRIPT = """
import dataclasses, json, os, sys, threading, time
from pathlib import Path
import ray
from whole_runs import on_pictures
from laasp_ray.sweep.goals import Targets
from laasp_ray.sweep.run import run_sweep

ray.init(log_to_driver=False)
seen, held, ended = set(), [], threading.Event()

def watch():
    while not ended.wait(0.3):
        alive = [a for a in ray._private.state.actors().values() if a["State"] == "ALIVE"]
        trainers = [a["Address"]["NodeID"] for a in alive if a["ActorClassName"] == "RayTrainWorker"]
        seen.update(trainers)
        held.append(len(trainers))

threading.Thread(target=watch, daemon=True).start()
folder = Path(sys.argv[1])
config = dataclasses.replace(on_pictures(folder, folder / "images", cluster__workers=1), name="sweep")
lines = []
result = run_sweep(config, Targets((0.03, 0.06, 0.09, 0.12)), say=lines.append)
ended.set()
print(json.dumps([sorted(seen), max(held), [row.status for row in result.rows], lines[0]]))
ray.shutdown()
"""


def run(tmp_path, environment):
    write_pictures(tmp_path / "images", side=8, train=12, test=6)
    paths = os.pathsep.join([os.getcwd(), *sys.path[:1], os.path.join(os.getcwd(), "tests")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": paths},
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_trials_run_on_both_nodes(tmp_path):
    with local_cluster(2) as environment:
        nodes, at_once, statuses, said = run(tmp_path, environment)
    assert said == "2 runs at a time, of 1 workers each"
    assert len(nodes) == 2 and at_once == 2
    assert statuses == ["finished"] * 4
