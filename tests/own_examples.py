"""A data set, losses and metrics that tests give as the user's own; workers import this module."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from laasp_ray.config import DataConfig, LaaspConfig, ModelConfig, RunConfig, SearchConfig, TrainConfig
from laasp_ray.tasks import Mean

SHAPE = (2, 6, 8)
"""Neither square nor of three channels: images cannot be."""


class Noise:
    """`count` inputs of SHAPE, each a function of the index, with three targets from its means. Training adds noise
    from torch's global generator.
    """

    def __init__(self, split: str, count: int = 24, augment: bool = True) -> None:
        self._split, self._count, self._augment = split, count, augment and split == "train"

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.Generator().manual_seed(index + (1000 if self._split == "test" else 0))
        inputs = torch.randn(SHAPE, generator=own)
        target = (inputs.mean((1, 2)) > 0).float()
        target = torch.stack([target[0], target[1], target.prod()])
        return inputs + (0.1 * torch.rand(()) if self._augment else 0.0), target


def data(split: str, count: int = 24, augment: bool = True) -> Noise:
    return Noise(split, count if split == "train" else 10, augment)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def bce(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)


def bce_of_model(model: nn.Module, batch: Any) -> torch.Tensor:
    inputs, targets = batch
    return bce(model(inputs), targets)


def right(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return ((outputs > 0) == (targets > 0.5)).float().mean(1)


def wrong(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return 1 - right(outputs, targets)


WRONG = Mean(wrong, higher_is_better=False)


def config_of(storage: Path, **changes: Any) -> RunConfig:
    """A run of the network above in a second or two, with the data, the loss and the metrics by import path."""
    config = RunConfig(
        name="own",
        storage=str(storage),
        model=ModelConfig(builder=f"{__name__}:network", input_shape=SHAPE),
        data=DataConfig(factory=f"{__name__}:data"),
        prune=LaaspConfig(flops_reduction=0.3, step=0.1, criteria=("l1", "cosine"), fine_tune_every=0.15),
        search=SearchConfig(images=16, batch_size=6),
        train=TrainConfig(
            epochs=3,
            prune_epoch=1,
            batch_size=6,
            learning_rate=0.05,
            loss=f"{__name__}:bce",
            metrics={"right": f"{__name__}:right", "wrong": f"{__name__}:WRONG"},
        ),
    )
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


def recipe_of_own() -> RunConfig:
    """For a job, by import path."""
    return config_of(Path("runs"))
