"""Training on a cluster of several nodes whose processes hang and whose nodes come and go."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.exhaustive, pytest.mark.timeout(900)]

BEGINNING = """
import json, os, signal, sys, tempfile, threading, time
import ray, torch
from ray.cluster_utils import Cluster
from helpers import images_of, randomise_batchnorm, small_run
from laasp_ray import models
from laasp_ray.distributed import deadlines, group, trainer as trainer_module
from laasp_ray.distributed.cluster import plan_resources
from laasp_ray.distributed.trainer import RayTrainer, put_network
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.train.loop import EpochPlan, TrainingPhase
import interruptions

def phase(number, epochs):
    plans = tuple(EpochPlan(epoch=epoch, data_epoch=epoch, learning_rate=0.05) for epoch in range(epochs))
    return TrainingPhase(number=number, phase="train", epochs=plans)

def furthest(one, other):
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)

folder = tempfile.mkdtemp()
config = small_run(folder, cluster__workers=2)
torch.manual_seed(0)
network = randomise_batchnorm(models.build(config.model)).eval()
state = capture(network, Plan.empty())
"""

NODES = (
    BEGINNING
    + """
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
trainer_module.WORTH_GROWING_S = 0.0
share = plan_resources(ray.cluster_resources(), config.cluster)
trainer = RayTrainer(put_network(network), config, share, folder, images_of(config))
workers, undisturbed, disturbed = [], [], []

def hear(epoch):
    undisturbed.append(epoch)
    workers.append(trainer._group.workers)

before = trainer.run(state, {}, phase(0, 4), hear)

def come_and_go(epoch):
    global second
    disturbed.append(epoch)
    workers.append(trainer._group.workers)
    if len(disturbed) == 1:
        cluster.remove_node(second, allow_graceful=False)
    if len(disturbed) == 2:
        second = cluster.add_node(num_cpus=1)

after = trainer.run(state, {}, phase(1, 4), come_and_go)
apart = [furthest(one.tensors, other.tensors) for one, other in zip(undisturbed, disturbed)]
positions = [epoch.position for epoch in disturbed]
print("result:", json.dumps([workers, positions, apart, before.metrics.top1, after.metrics.top1]))
trainer.close()
ray.shutdown()
cluster.shutdown()
"""
)

STOPPED = (
    BEGINNING
    + """
for module in (deadlines, group):
    for name, seconds in (("SILENT_S", 8.0), ("LOOK_S", 1.0), ("MAILBOX_S", 8.0)):
        if hasattr(module, name):
            setattr(module, name, seconds)
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
share = plan_resources(ray.cluster_resources(), config.cluster)
trainer = RayTrainer(put_network(network), config, share, folder, images_of(config))
undisturbed, disturbed = [], []
trainer.run(state, {}, phase(0, 2), undisturbed.append)

def stop_after_the_first(epoch):
    disturbed.append(epoch)
    if len(disturbed) == 1:
        for process, title in interruptions.descendants(os.getpid()).items():
            if sys.argv[1] in title:
                os.kill(process, signal.SIGSTOP)
                break
        else:
            raise AssertionError(f"no process {sys.argv[1]}")

trainer.run(state, {}, phase(1, 2), stop_after_the_first)
same = all(torch.equal(undisturbed[-1].tensors[name], disturbed[-1].tensors[name]) for name in state.tensors)
print("result:", json.dumps([[epoch.position for epoch in disturbed], same]))
trainer.close()
ray.shutdown()
"""
)


def outcome_of(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = [line for line in done.stdout.splitlines() if line.startswith("result: ")]  # Ray prints there, too
    return json.loads(found.removeprefix("result: ")), done.stderr


def test_a_node_that_is_gone_takes_its_trainer_and_one_that_comes_brings_one():
    (workers, positions, apart, before, after), said = outcome_of(NODES)
    assert workers == [2, 2, 2, 2, 2, 1, 2, 2] or workers == [2, 2, 2, 2, 2, 1, 1, 2]
    assert positions == [0, 1, 2, 3]
    assert apart == [0, 0, 0, 0]  # two parts on one worker are added in the same order as on two
    assert after == before
    assert "there is room for 1 of 2 trainers" in said and "continues with a larger group" in said


@pytest.mark.parametrize("who", ["RayTrainWorker", "ray::Mailbox"])
def test_a_process_that_is_stopped_is_named_and_replaced(who):
    (positions, same), said = outcome_of(STOPPED, who)
    assert positions == [0, 1] and same
    expected = {"RayTrainWorker": "no heartbeat for", "ray::Mailbox": "its mailbox has not answered for"}[who]
    assert expected in said
