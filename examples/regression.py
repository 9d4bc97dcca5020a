"""Regression: how much do the digits in a picture add up to? The squared error, and the mean absolute one as metric.

python examples/regression.py
"""

from __future__ import annotations

import torch
from multi_label import network as of_ten
from scenes import SIDE, Scenes
from settings import settings
from torch import nn

from laasp_ray import prune
from laasp_ray.tasks import Mean

SCALE = 10.0
"""Sums are given to the network in tens, so that the loss is about 1 at the start."""


class Sums(Scenes):
    """Item: a picture (1, 32, 32), at random a little darker or brighter, and the sum of its digits in tens.

    The random numbers are torch's global ones. A run seeds them for every item by (seed, epoch, index).
    """

    def __init__(self, split: str, count: int) -> None:
        super().__init__(split, count)
        self._training = split == "train"

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        scene = self.scene(index)
        picture = torch.from_numpy(scene.picture)
        if self._training:
            picture = picture * (0.8 + 0.4 * torch.rand(()))
        return picture, torch.tensor(scene.labels.sum() / SCALE, dtype=torch.float32)


def data(split: str, images: int = 1500) -> Sums:
    return Sums(split, images if split == "train" else images // 5)


def network() -> nn.Module:
    layers = of_ten()
    assert isinstance(layers, nn.Sequential)
    layers[-1] = nn.Linear(layers[-1].in_features, 1)
    return layers


class SquaredError:
    """The squared error (n,). `distillation` says how to imitate a teacher, which `train.distill` needs."""

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs[:, 0] - targets) ** 2

    def distillation(self, outputs: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs[:, 0] - teacher[:, 0]) ** 2


def absolute(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return SCALE * (outputs[:, 0] - targets).abs()


METRICS = {"mean absolute error": Mean(absolute, higher_is_better=False)}

if __name__ == "__main__":
    schedule = {"epochs": 6, "prune_epoch": 4, "schedule": "steps", "learning_rate": 0.001}
    config = settings("regression", "regression:network", (1, SIDE, SIDE), distill=0.3, **schedule)
    result = prune(config, network(), data=data, loss=SquaredError(), metrics=METRICS, distributed=False)
    print(result.summary["metrics"])
