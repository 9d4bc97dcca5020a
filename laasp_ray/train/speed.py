"""Measures the speed of one worker on a few real batches; a dry run scales it up."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from laasp_ray.config import RunConfig
from laasp_ray.data.ordering import epoch_batches, eval_batches, rank_share
from laasp_ray.models.copying import deep_copy
from laasp_ray.models.format import in_format_of, to_fast_format
from laasp_ray.tasks import CLASSIFICATION, Task
from laasp_ray.train.data import PhaseData
from laasp_ray.train.precision import autocast

BATCHES = 6
"""The largest number of timed batches, after one that is not timed."""
BUDGET_S = 8.0
"""No new batch is started after this many seconds."""
CPU_BATCH = 32
"""The largest batch on a CPU. The speed depends little on it there, and a larger batch may take a minute."""


@dataclass(frozen=True)
class TrainingSpeed:
    """Images a second of one trainer, with decoding: in training, and in evaluation on the test images."""

    training: float
    evaluation: float
    device: str
    loader: str


def measure_training(
    unpruned: nn.Module, config: RunConfig, device: torch.device, world: int = 1, task: Task = CLASSIFICATION
) -> TrainingSpeed:
    """Times batches as one rank of `world` trains and evaluates them. `unpruned` is copied and not changed.

    Raises DataError as the loaders do.
    """
    size = config.train.global_batch(world)
    size = size if device.type == "cuda" else min(size, CPU_BATCH * world)
    data = PhaseData(config.data, batch_size=size, seed=config.seed, device=device, world=world, task=task)
    task = data.task
    model = _copy_on(unpruned, device, config.model.input_shape)
    teacher = _copy_on(unpruned, device, config.model.input_shape).eval() if config.train.distill else None
    trained = task.trained(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=config.train.momentum)

    def step(images: Any, labels: Any) -> None:
        with autocast(config.train.precision, device):
            pictures = in_format_of(model, images)
            output = trained(pictures, labels) if task.runs_model else trained(pictures)
            if teacher is not None:
                with torch.no_grad():
                    teacher(in_format_of(model, images))
        optimizer.zero_grad(set_to_none=True)
        losses, _ = task.training_sum(output, labels, len(images), config.train)
        (losses / len(images)).backward()
        optimizer.step()

    def infer(images: Any, labels: Any) -> None:
        with torch.inference_mode():
            task.run(model, in_format_of(model, images), labels)

    try:
        batches = epoch_batches(data.train_images, batch_size=size, seed=config.seed, epoch=0)[: BATCHES + 1]
        shares = [rank_share(batch, 0, world) for batch in batches]
        training = _rate(((batch.images, batch.labels) for batch in data.train_loader.epoch(shares)), step, device)
        model.eval()
        shares = eval_batches(data.test_images, batch_size=data.share, rank=0, world=world)[: BATCHES + 1]
        evaluation = _rate(((batch.images, batch.labels) for batch in data.test_loader.epoch(shares)), infer, device)
        return TrainingSpeed(training, evaluation, _name(device), data.train_loader.name)
    finally:
        data.close()


def measure_forward(unpruned: nn.Module, config: RunConfig, device: torch.device) -> float:
    """Images a second of the network in eval mode, float32, with images that are already on `device`."""
    model = deep_copy(unpruned).to(device).eval()
    size = config.search.batch_size if device.type == "cuda" else min(config.search.batch_size, CPU_BATCH)
    images = torch.randn(size, *config.model.input_shape, device=device)
    images = in_format_of(to_fast_format(model, images[:1]), images)
    labels = torch.zeros(size, dtype=torch.int64)

    def infer(images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.inference_mode():
            model(images)

    return _rate(itertools.repeat((images, labels), BATCHES + 1), infer, device)


def _rate(
    batches: Iterable[tuple[Any, Any]],
    work: Callable[[Any, Any], None],
    device: torch.device,
) -> float:
    """Images a second. The first batch is a warm-up; it counts only if it is the only one."""
    rates: list[tuple[int, float]] = []
    begun = last = time.perf_counter()
    for images, labels in batches:
        work(images, labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        rates.append((len(images), now - last))
        last = now
        if len(rates) > 1 and now - begun > BUDGET_S:
            break
    timed = rates[1:] or rates
    return sum(count for count, _ in timed) / sum(seconds for _, seconds in timed)


def _copy_on(unpruned: nn.Module, device: torch.device, input_shape: Sequence[int]) -> nn.Module:
    """A copy of the network on `device`, in the memory format of training (train/trainer.py)."""
    model = deep_copy(unpruned).to(device)
    if device.type == "cuda":
        to_fast_format(model, torch.zeros(1, *input_shape, device=device))
    return model.train()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
