"""Search workers on clusters with GPUs, as Ray counts them: the machine needs none."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.exhaustive, pytest.mark.timeout(600)]

SCRIPT = """
import json, os, signal, time
import ray
from laasp_ray.config import ClusterConfig
from laasp_ray.distributed import search_workers
from laasp_ray.distributed.cluster import plan_resources
from laasp_ray.distributed.search_workers import Job, SearchWorkers

ray.init(address="local", num_cpus=8, num_gpus=4, include_dashboard=False, log_to_driver=False)
share = plan_resources(ray.cluster_resources(), ClusterConfig(workers=2))

@ray.remote
class Trainer:
    def gpus(self):
        return ray.get_gpu_ids()

options = {"num_cpus": share.trainer_resources["CPU"], "num_gpus": share.trainer_resources["GPU"]}
trainers = [Trainer.options(**options).remote() for _ in range(share.workers)]
held = [ray.get(trainer.gpus.remote()) for trainer in trainers]
workers = SearchWorkers(share)

def work(count):
    for _ in range(count):
        workers.submit(Job(time.sleep, (0.05,), "a nap", "-"))
    for _ in range(count):
        workers.collect()
    while any(worker.place is None for worker in workers._workers):
        workers._wait()
    return sorted(gpu for worker in workers._workers for gpu in worker.place.gpus)

before = work(8)
search_workers.LATE_S = search_workers.FIRST_LATE_S = 3.0
stopped = workers._workers[0].place.pid
os.kill(stopped, signal.SIGSTOP)
started = time.monotonic()
work(8)
while any(worker.place is not None and worker.place.pid == stopped for worker in workers._workers):
    work(1)
after = work(8)
workers.make_room()
print(json.dumps([held, before, after, len(workers._workers), time.monotonic() - started]))
workers.close()
ray.shutdown()
"""


def test_each_gpu_has_one_worker_and_a_stopped_one_is_replaced_on_its_own():
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=240, check=True
    )
    held, before, after, left, seconds = json.loads(done.stdout.splitlines()[-1])
    assert held == [[0], [1]]
    assert before == after == ["0", "1", "2", "3"]
    assert left == 2  # those beside trainers; the others made room
    assert seconds > 3


TWO_RUNS = """
import json
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from laasp_ray.config import ClusterConfig
from laasp_ray.distributed.cluster import plan_resources
from laasp_ray.distributed.search_workers import Job, SearchWorkers

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 4, "include_dashboard": False})
cluster.add_node(num_cpus=8, num_gpus=4)
ray.init(address=cluster.address, log_to_driver=False)
share = plan_resources(ray.cluster_resources(), ClusterConfig(workers=4, search_workers=4))

@ray.remote(num_cpus=0.05, num_gpus=0.6)
class Trainer:
    def node(self):
        return ray.get_runtime_context().get_node_id()

def trainers_on(node):
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return [Trainer.options(scheduling_strategy=there).remote() for _ in range(4)]

first, second = ray.nodes()
ours = trainers_on(first)
nodes = ray.get([trainer.node.remote() for trainer in ours])
workers = SearchWorkers(share, trainers=lambda: nodes)
workers.call(Job(len, ("four",), "a length", "-"))
while any(worker.place is None for worker in workers._workers):
    workers._wait()
theirs = trainers_on(second)
ready, _ = ray.wait([trainer.node.remote() for trainer in theirs], num_returns=4, timeout=60)
print(json.dumps([[worker.place.node_id in nodes for worker in workers._workers], len(ready)]))
workers.close()
ray.shutdown()
cluster.shutdown()
"""


def test_a_run_leaves_the_gpus_of_another_node_to_another_runs_trainers():
    """Four workers of 0.4 spread over both nodes would leave room for three trainers of 0.6 on the second one."""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", TWO_RUNS], capture_output=True, text=True, env=environment, timeout=400, check=True
    )
    beside, placed = json.loads(done.stdout.splitlines()[-1])
    assert beside == [True] * 4 and placed == 4
