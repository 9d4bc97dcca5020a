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
seen, drivers, held, ended = set(), set(), [], threading.Event()

def watch():
    while not ended.wait(0.3):
        alive = [a for a in ray._private.state.actors().values() if a["State"] == "ALIVE"]
        trainers = [a["Address"]["NodeID"] for a in alive if a["ActorClassName"] == "RayTrainWorker"]
        now = [a["Address"]["NodeID"] for a in alive if a["ActorClassName"] == "ImplicitFunc"]
        seen.update(trainers)
        drivers.update(now)
        held.append((len(now), len(trainers)))

threading.Thread(target=watch, daemon=True).start()
folder = Path(sys.argv[1])
config = dataclasses.replace(on_pictures(folder, folder / "images", cluster__workers=1), name="sweep")
lines = []
result = run_sweep(config, Targets((0.03, 0.06, 0.09, 0.12)), say=lines.append)
ended.set()
mine = ray.get_runtime_context().get_node_id()
most = [max(of) for of in zip(*held, strict=True)]
print(json.dumps([sorted(seen), drivers == {mine}, most, [row.status for row in result.rows], lines[0]]))
ray.shutdown()
"""

ON_A_BARE_HEAD = """
import json
import ray
from ray.cluster_utils import Cluster
from laasp_ray.distributed.tuning import run_trials

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
cluster.add_node(num_cpus=2)
ray.init(address=cluster.address, log_to_driver=False)

class Plan:
    left, nodes = ["a", "b", "c"], []
    is_done = property(lambda self: not self.left)

    def next(self):
        return {"name": self.left.pop()} if self.left else None

    def reported(self, name, report):
        self.nodes.append(report["node"])
        return False

    def ended(self, name, last, *, lost):
        assert not lost

def trial(settings, report):
    report({"top1": 0.0, "node": ray.get_runtime_context().get_node_id()})

plan = Plan()
run_trials(plan, trial, 2)
print(json.dumps([len(plan.nodes), set(plan.nodes) == {ray.get_runtime_context().get_node_id()}]))
ray.shutdown()
cluster.shutdown()
"""


def run(script, tmp_path, environment):
    paths = os.pathsep.join([os.getcwd(), *sys.path[:1], os.path.join(os.getcwd(), "tests")])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": paths},
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_trials_train_on_both_nodes_and_their_drivers_are_where_the_sweeps_is(tmp_path):
    write_pictures(tmp_path / "images", side=8, train=12, test=6)
    with local_cluster(2) as environment:
        nodes, drivers_are_here, at_once, statuses, said = run(SCRIPT, tmp_path, environment)
    assert said == "2 runs at a time, of 1 worker each"
    assert len(nodes) == 2 and at_once[0] == 2 and drivers_are_here  # trainers meet if the machine is not too slow
    assert statuses == ["finished"] * 4


def test_trials_drivers_need_no_cpu_of_the_head(tmp_path):
    assert run(ON_A_BARE_HEAD, tmp_path, os.environ) == [3, True]
