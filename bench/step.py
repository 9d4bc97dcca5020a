"""What the training loop adds to the bare forward and backward pass of the same network on the same images.

    python bench/step.py [--batch 128] [--steps 20] [--repeats 5] [--threads 1]

Alternates between the bare loop (forward, loss, backward, SGD on tensors in memory) and the product's
(train/loop.py, on the same tensors, with heartbeats, counts and the feeding thread), ResNet-20 at 32 x 32. Prints the
medians of wall-clock and CPU seconds a step, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from machine import machine
from torch.nn import functional

from laasp_ray import models
from laasp_ray.config import TrainConfig
from laasp_ray.data.loaders.reading import Batch
from laasp_ray.recipes import recipe
from laasp_ray.tasks import CLASSIFICATION
from laasp_ray.train.loop import EpochPlan, TrainingPhase, run_training_phase


class InMemory:
    """The data of a training phase: random images, and two of them as test images."""

    name = "in memory"
    task = CLASSIFICATION
    in_background = True
    rank, world, parts, own_parts = 0, 1, 1, (0,)

    def __init__(self, batch: int, steps: int, device: torch.device, side: int = 32, classes: int = 10) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.images = torch.randn(batch * steps, 3, side, side, generator=generator, device=device)
        self.labels = torch.randint(0, classes, (batch * steps,), generator=generator, device=device)
        self.device, self.share = device, batch
        self.train_images, self.test_images = batch * steps, 2
        self.train_loader = self.test_loader = self

    def epoch(self, batches: Sequence[np.ndarray], epoch: int = 0) -> Iterator[Batch]:
        for indices in batches:
            yield Batch(self.images[indices], self.labels[indices], indices)

    def take_unreadable(self) -> tuple[str, ...]:
        return ()


def bare(data: InMemory, config: TrainConfig, steps: int) -> None:
    """The loop that every tutorial has."""
    model = models.build(recipe("resnet20_cifar10").model).to(data.device).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
    )
    for images, labels in zip(data.images.split(data.share), data.labels.split(data.share), strict=True):
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def ours(data: InMemory, config: TrainConfig, steps: int) -> None:
    model = models.build(recipe("resnet20_cifar10").model).to(data.device)
    phase = TrainingPhase(number=0, phase="fine-tune", epochs=(EpochPlan(0, 0, 0.1),))
    events = run_training_phase(model, {}, phase, data=data, config=config, seed=0)  # type: ignore[arg-type]
    next(iter(events))


def timed(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(machine())
    data = InMemory(options.batch, options.steps, device)
    config = TrainConfig(epochs=1, prune_epoch=0, batch_size=options.batch)
    found: dict[str, list[tuple[float, float]]] = {"bare loop": [], "laasp_ray": []}
    for repeat in range(options.repeats + 1):
        for name, work in (("bare loop", bare), ("laasp_ray", ours)):
            seconds = timed(lambda work=work: work(data, config, options.steps), device)  # type: ignore[misc]
            if repeat:  # the first is a warm-up
                found[name].append(seconds)
    print(f"\n{options.batch} images a step, {options.steps} steps, medians of {options.repeats}\n")
    print("| loop | ms a step | CPU ms a step | images a second |\n|---|---|---|---|")
    medians = {}
    for name, seconds in found.items():
        wall, cpu = (1000 * statistics.median(column) / options.steps for column in zip(*seconds, strict=True))
        medians[name] = (wall, cpu)
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {1000 * options.batch / wall:,.0f} |")
    ratios = [ours / bare for bare, ours in zip(*medians.values(), strict=True)]
    print(f"\nlaasp_ray against the bare loop: {ratios[0]:.3f} of its time, {ratios[1]:.3f} of its CPU time")


if __name__ == "__main__":
    main()
