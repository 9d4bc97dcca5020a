"""What spreading an iteration of the search over Ray costs and gives, and what it would give on many GPUs.

    python bench/fanout.py [--data DATA] [--repeats 3] [--iterations 5] [--model-only] [--gpu-images-per-second 1500]
        [--network-gigabits 10]

1. One iteration of ResNet-20 (racing off) by the search's workers, actors of one core each, on one and on two of them,
   against the same units worked off by one and by two plain processes that know nothing of Ray. Medians.
2. What handing out a unit costs: units of one image, and the scheduling of an iteration of 500 candidates with workers
   that answer at once.
3. The driver's work in an iteration of ResNet-50, part by part, as it was and as it is (bench/driver.py).
4. A model of one iteration of ResNet-50 at 5,000 images on 8, 64 and 256 GPUs. Its constants are measured here, except
   for the two flags, which are assumptions: a GPU's forward throughput and a node's network. A worker's rebuilding and
   tracing of the network is measured on the CPU. With --model-only parts 1 and 2 are left out, and a unit is taken to
   cost HAND_OUT_SECONDS (search/schedule.py).
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from driver import AFTER_A_PRUNE, WAYS, Measured, measure_driver, show
from machine import machine
from search import NETWORKS, load, proposals_of

from laasp_ray.config import ClusterConfig
from laasp_ray.data.calibration import CalibrationImages
from laasp_ray.distributed.cluster import LOCAL_ENVIRONMENT, plan_resources
from laasp_ray.distributed.executor import RayExecutor
from laasp_ray.distributed.trainer import put_network
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.recipes import recipe
from laasp_ray.search.candidates import tasks_of
from laasp_ray.search.engine import BranchPoints, Cost, Engine, Losses
from laasp_ray.search.evaluate import CalibrationSet, LossTask, ready
from laasp_ray.search.executor import SerialBackend
from laasp_ray.search.schedule import HAND_OUT_SECONDS, Settings, Unit, measure

IMAGES, BATCH = 1000, 64
RACES = {1.6: (0.109, 8), 4.0: (0.159, 5)}
"""The share of the evaluations that a race needs, and its rounds and others that wait for each other, by
search.racing_growth: as `bench/races.py --only resnet56_epoch60 --compensated` finds them in float32.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of development data (default: noise, random weights)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=5, help="of the driver's work")
    parser.add_argument("--model-only", action="store_true", help="parts 3 and 4 only")
    parser.add_argument("--gpu-images-per-second", type=float, default=1500.0, help="ResNet-50, forward, float32")
    parser.add_argument("--network-gigabits", type=float, default=10.0, help="of a node, per second")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine("ray"), flush=True)
    unit_s = HAND_OUT_SECONDS if options.model_only else spreading(options)
    driver = measure_driver(options.iterations)
    print()
    show(driver)
    model_of_an_iteration(options, unit_s, driver)
    return 0


def spreading(options: argparse.Namespace) -> float:
    """Prints what spreading costs and gives. Returns the seconds that a unit costs."""
    inputs = iteration_inputs(options.data)
    plain = {workers: plain_seconds(inputs, workers, options.repeats) for workers in (1, 2)}
    spread = {workers: ray_seconds(inputs, workers, options.repeats) for workers in (1, 2)}
    speed_ups = [2 * plain[1] / plain[2], plain[1] / spread[2][0]]  # both against one plain process
    print("| one iteration of ResNet-20, seconds | 1 | 2 | speed-up |\n|---|---|---|---|")
    print(f"| plain processes, an iteration each | {plain[1]:.2f} | {plain[2]:.2f} | {speed_ups[0]:.2f} |")
    print(f"| Ray, one iteration | {spread[1][0]:.2f} | {spread[2][0]:.2f} | {speed_ups[1]:.2f} |")
    print(f"Ray's speed-up is {speed_ups[1] / speed_ups[0]:.3f} of the plain processes'")
    print(f"a unit costs {spread[2][1] * 1e3:.2f} ms of hand-out and return")
    print(f"scheduling an iteration of 500 candidates, 5,000 images, 64 workers: {scheduling_seconds():.3f} s")
    return spread[2][1]


def iteration_inputs(data: Path | None) -> tuple[Any, list[LossTask], torch.Tensor, torch.Tensor]:
    network = replace(NETWORKS["resnet20"], images=IMAGES)
    model, images, labels = load(network, data, 1.0, torch.device("cpu"))
    return model, tasks_of(proposals_of(model, network)[0]), images, labels


def plain_seconds(inputs: tuple[Any, ...], workers: int, repeats: int) -> float:
    """Seconds until each of `workers` processes has worked off an iteration of its own, side by side."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(workers), context.Queue()
    model, tasks, images, labels = inputs
    arguments = (model, tasks, images.numpy(), labels.numpy(), repeats, barrier, answers)
    processes = [context.Process(target=work_alone, args=arguments) for _ in range(workers)]
    for process in processes:
        process.start()
    rounds = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return statistics.median(max(seconds) for seconds in zip(*rounds, strict=True))


def work_alone(
    model: Any, tasks: list[LossTask], images: np.ndarray, labels: np.ndarray, repeats: int, barrier: Any, answers: Any
) -> None:
    torch.set_num_threads(1)
    calibration = CalibrationSet(torch.from_numpy(images), torch.from_numpy(labels), BATCH)
    seconds = []
    for _ in range(repeats + 1):
        barrier.wait()
        started = time.perf_counter()
        backend = SerialBackend(Engine(ready(model, torch.device("cpu")), calibration), tasks)
        measure(backend, len(tasks), Settings(len(images), BATCH), lambda position, result: None)
        seconds.append(time.perf_counter() - started)
    answers.put(seconds[1:])


def ray_seconds(inputs: tuple[Any, ...], workers: int, repeats: int) -> tuple[float, float]:
    """Seconds of an iteration, and of a unit with next to nothing in it, on a cluster of so many cores."""
    model, tasks, images, labels = inputs
    config = recipe("resnet20_cifar10")
    # Prepared images, so that both sides do the same: mean 0 and deviation 1 of pixels from 0 to 1 change nothing.
    data = replace(config.data, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    search = replace(config.search, images=len(images), batch_size=BATCH, racing="off")
    config = replace(config, data=data, search=search)
    calibration = CalibrationImages(images, labels, np.arange(len(images)), "")
    os.environ.update(LOCAL_ENVIRONMENT)
    ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        share = plan_resources(ray.cluster_resources(), ClusterConfig(workers=1))
        network = put_network(model)
        state = capture(model, Plan.empty())
        with closing(RayExecutor(network, model, calibration, config, share)) as executor:
            iteration = timed(lambda: executor.measure(state, tasks, lambda *_: None, lambda _: None), repeats)
        alone = replace(config, search=replace(search, candidates_per_task=1))
        image = CalibrationImages(images[:1], labels[:1], np.arange(1), "")
        copies = [LossTask(f"copy {number}", Plan.empty(), {}) for number in range(400)]
        with closing(RayExecutor(network, model, image, alone, share)) as executor:
            units = timed(lambda: executor.measure(state, copies, lambda *_: None, lambda _: None), repeats)
    finally:
        ray.shutdown()
    return iteration, units / len(copies)


def timed(work: Callable[[], object], repeats: int) -> float:
    """The median of some runs, after one that starts the processes."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


class InstantBackend:
    """A WorkBackend that knows every answer: what is left is the scheduling."""

    def __init__(self, losses: np.ndarray, slots: int) -> None:
        self._losses, self.slots, self._queue, self.units = losses, slots, [], 0

    def cost(self, task: int) -> Cost:
        return Cost(task * 1000, (len(self._losses) - task) * 1000)

    def submit(self, unit: Unit) -> None:
        self._queue.append(unit)
        self.units += 1

    def collect(self) -> tuple[Unit, Losses]:
        unit = self._queue.pop(0)
        return unit, Losses(self._losses[np.array(unit.tasks)[:, None], unit.images], {}, 0.25)


def scheduling_seconds() -> float:
    draw = np.random.default_rng(0)
    base = draw.exponential(0.3, 5000)
    losses = base + base * draw.normal(np.linspace(0, 0.5, 501)[::-1, None] ** 2, 0.3, (501, 5000))
    settings = Settings(images=5000, batch_size=250, racing=True)
    return timed(lambda: measure(InstantBackend(losses, 64), 501, settings, lambda *_: None), 3)


def model_of_an_iteration(options: argparse.Namespace, unit_s: float, driver: Measured) -> None:
    network = NETWORKS["resnet50"]
    model, images, _ = load(replace(network, images=2), None, 1.0, torch.device("cpu"))
    proposals, picks, _ = proposals_of(model, network)
    tasks = tasks_of(proposals)
    branch_points = BranchPoints(model, images[:1])
    macs = branch_points.cost(tasks[-1]).own
    own = sum(branch_points.cost(task).own for task in tasks[:-1]) / macs
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    count, speed = 5000, options.gpu_images_per_second
    transfer_s = weight_bytes * 8 / (options.network_gigabits * 1e9)
    worker_s = statistics.median(wall for wall, _ in driver.worker)
    print(f"\nResNet-50: {picks} proposals, {len(proposals)} candidates worth {own:.1f} forward passes an image")
    print(
        f"assumed: {speed:.0f} images/s a GPU, {options.network_gigabits:g} Gbit/s a node: {transfer_s:.2f} s to send; "
        f"a unit costs {unit_s * 1e3:.2f} ms"
    )
    columns = ["GPUs", "growth", "forwards, all", "forwards, race", "rounds", "worker and network", "reference"]
    columns += [f"{kind}, driver {way}" for kind in ("all", "race") for way in WAYS]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for gpus, growth in itertools.product((8, 64, 256), RACES):
        raced, steps = RACES[growth]
        nodes = math.ceil(gpus / 8)
        # Ray hands the network on from node to node, so that the time grows with the logarithm of their number.
        fixed = worker_s + transfer_s * max(1, math.ceil(math.log2(nodes + 1)))
        exhaustive = count * (own + 1) / speed / gpus
        racing, unpruned = count * own * raced / speed / gpus, count / speed / gpus
        # The driver hands out one by one, to as many as that is worth for (search/schedule.py); a round ends with its
        # last unit. What a round takes beyond its share of the forward passes is listed apart.
        round_s = count * own * raced / speed / steps
        units = min(gpus, math.ceil(math.sqrt(round_s / unit_s)))
        handling = steps * (round_s / units - round_s / gpus + units * unit_s + 0.05)
        cells = [exhaustive, racing, handling, fixed, picks * count / speed]
        # After a prune a race needs no pass without a prune (search.racing_memory).
        raced_s = [racing + handling + (0.0 if way == AFTER_A_PRUNE else unpruned) for way in WAYS]
        for work in ([exhaustive] * len(WAYS), raced_s):
            cells += [driver.total(way)[0] + fixed + seconds for way, seconds in zip(WAYS, work, strict=True)]
        print(f"| {gpus} | {growth} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
