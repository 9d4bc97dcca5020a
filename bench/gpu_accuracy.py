"""bench/gpu.py, accuracy: ResNet-20 on CIFAR-10 from Parquet, for as many epochs as the stage's time allows."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time

import torch
from gpu_machine import usable_cpus
from gpu_networks import device_of
from gpu_results import Rows

from laasp_ray import models
from laasp_ray.models.format import to_channels_last
from laasp_ray.recipes import recipe
from laasp_ray.train.data import PhaseData
from laasp_ray.train.loop import EpochPlan, EpochResult, TrainingPhase, run_training_phase

RESERVE = 0.15
"""The share of the time that is kept for the evaluations and for what is slower than the first epochs."""
MOST = 160
"""The recipe's epochs."""


def accuracy(options: argparse.Namespace, rows: Rows) -> None:
    """The recipe's training, with its learning rate falling as a cosine over the epochs that fit."""
    began, device = time.monotonic(), device_of(options)
    path = options.cifar10 or (options.data / "cifar10_mini" if options.data is not None else None)
    if path is None:
        rows.add("ResNet-20 on CIFAR-10", {"left out": "no --cifar10 or --data is given"})
        return
    base = recipe("resnet20_cifar10")
    config = dataclasses.replace(base.data, path=str(path), threads=min(8, usable_cpus()))
    data = PhaseData(config, batch_size=base.train.batch_size, seed=0, device=device)
    train = dataclasses.replace(base.train, autotune=True, test_every=1)
    try:
        torch.manual_seed(0)
        model = models.build(base.model).to(device)
        model = to_channels_last(model) if device.type == "cuda" else model
        state: dict[str, torch.Tensor] = {}
        taken = []
        for number in range(2):  # the first one warms up, the second one is the measure
            first = run_training_phase(
                model, state, phase_of([(number, 0.1 * (number + 1) / 2)]), data=data, config=train, seed=0
            )
            done = next(iter(first))
            assert isinstance(done, EpochResult)
            state = dict(done.optimizer_state)
            taken.append(done.seconds)
        left = (options.seconds - (time.monotonic() - began)) * (1 - RESERVE)
        epochs = min(MOST, int(left / (1.3 * taken[-1])))
        rows.add("ResNet-20 on CIFAR-10, an epoch", {"seconds": taken[-1], "images": data.train_images, "fit": epochs})
        if epochs < 1:
            return
        rates = [(2 + n, 0.1 * (1 + math.cos(math.pi * n / epochs)) / 2) for n in range(epochs)]
        for event in run_training_phase(model, state, phase_of(rates), data=data, config=train, seed=0):
            metrics = event.metrics
            if metrics is None:
                continue
            last = not isinstance(event, EpochResult)
            position = "end" if last else f"epoch {event.plan.epoch}"  # type: ignore[union-attr]
            if last or event.plan.epoch % 10 == 0:  # type: ignore[union-attr]
                figures = {"top-1": metrics.top1, "loss": metrics.loss, "epochs": epochs + 2, "batch": train.batch_size}
                rows.add(f"ResNet-20 on CIFAR-10, {position}", figures)
    finally:
        data.close()


def phase_of(rates: list[tuple[int, float]]) -> TrainingPhase:
    plans = tuple(EpochPlan(epoch, epoch, rate) for epoch, rate in rates)
    return TrainingPhase(number=0, phase="train", epochs=plans)
