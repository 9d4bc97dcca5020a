"""Runs on a cluster that begins with a head without CPUs, and whose nodes Ray's own autoscaler adds."""

import json
import os
import subprocess
import sys
import time

import interruptions
import pytest
from autoscaling_cluster import autoscaling_cluster
from run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.exhaustive, pytest.mark.timeout(900)]

SMALL = {
    "prune.flops_reduction": 0.03,
    "prune.fine_tune_epochs": 1,
    "search.images": 20,
    "search.batch_size": 20,
    "train.epochs": 2,
    "train.prune_epoch": 1,
    "train.drop_epochs": [1],
}
COUNT = "import json, ray; ray.init(log_to_driver=False); print(json.dumps(ray.cluster_resources().get('CPU', 0)))"


def run(storage, environment, **settings):
    command = interruptions.command(storage, "run", True, SMALL | settings)
    return ended(command, environment)


def ended(command, environment):
    paths = os.pathsep.join([str(interruptions.ROOT), environment.get("PYTHONPATH", "")])
    environment = environment | {"PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


def cpus(environment):
    return json.loads(ended([sys.executable, "-c", COUNT], environment).stdout.splitlines()[-1])


@pytest.mark.parametrize("second", [True, False], ids=["second", "first"])
def test_the_nodes_that_a_run_wants_are_added_and_let_go(tmp_path, second):
    with autoscaling_cluster(3, second=second) as environment:
        assert cpus(environment) == 0
        done = run(tmp_path, environment)
        assert done.returncode == 0, done.stderr[-4000:]
        assert "the cluster has 0 of 2 CPUs; its autoscaler is asked for the others (for 0 s now)" in done.stderr
        finished = RunFolder(str(tmp_path / "run"))
        assert finished.kinds()[-1] == "finish" and finished.outcome()
        if not second:  # the first autoscaler tells nodes apart by their addresses, of which there is one here
            return
        deadline = time.monotonic() + 90
        while cpus(environment) > 0:  # nothing is asked for any more
            assert time.monotonic() < deadline
            time.sleep(3)


def test_what_the_cluster_can_never_have_is_said_soon(tmp_path):
    with autoscaling_cluster(1, second=True) as environment:
        began = time.monotonic()
        done = run(tmp_path, environment)
        assert done.returncode == 2, done.stderr[-4000:]
        assert time.monotonic() - began < 120
        last = done.stderr.strip().splitlines()[-1]
        assert last == (
            "error: cluster.workers is 2, but the cluster's autoscaler can never have so many CPUs (there are 0 now): "
            "lower it, or raise max_workers (KubeRay: maxReplicas) of the cluster"
        )
        # GPUs come from no node here, and the request for CPUs is gone.
        done = run(tmp_path, environment, **{"cluster.gpus": 1, "cluster.workers": 0})
        assert done.returncode == 2, done.stderr[-4000:]
        assert "cluster.gpus is 1, but the cluster's autoscaler can never have so many GPUs" in done.stderr


def test_the_first_autoscaler_does_not_say_never_so_the_wait_ends(tmp_path):
    with autoscaling_cluster(1, second=False) as environment:
        done = run(tmp_path, environment, **{"cluster.wait_minutes": 0.7})
        assert done.returncode == 2, done.stderr[-4000:]
        assert done.stderr.strip().splitlines()[-1] == (
            "error: cluster.workers is 2, and after 0.7 min the cluster has 1 CPUs on 2 nodes: set cluster.workers=1 "
            "to use what is there, or raise cluster.wait_minutes"
        )
