"""Multi-label classification: which digits are in a picture? Binary cross-entropy on a data set of one's own.

python examples/multi_label.py
"""

from __future__ import annotations

import torch
from scenes import SIDE, Scenes
from settings import settings
from torch import nn
from torch.nn import functional

from laasp_ray import prune


class Labelled(Scenes):
    """Item: a picture (1, 32, 32) and a float for each of the ten digits, 1 if it is in there."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        scene = self.scene(index)
        target = torch.zeros(10)
        target[torch.from_numpy(scene.labels)] = 1
        return torch.from_numpy(scene.picture), target


def data(split: str, images: int = 1500) -> Labelled:
    return Labelled(split, images if split == "train" else images // 5)


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * (SIDE // 8) ** 2, 10))


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One value for each picture: the mean over its ten digits."""
    return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)


class F1:
    """The micro-averaged F1: it needs counts over all pictures, so it is a metric with sums of its own."""

    higher_is_better = True
    width = 3

    def sums(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found, there = outputs > 0, targets > 0.5
        return torch.stack([(found & there).sum(), found.sum(), there.sum()])

    def value(self, sums: torch.Tensor) -> float:
        both, found, there = sums.tolist()
        return 2 * both / (found + there) if found + there else 0.0


def exact(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 for each picture whose digits are all right, else 0."""
    return ((outputs > 0) == (targets > 0.5)).all(1).float()


METRICS = {"F1": F1, "exact": exact}
"""The first metric decides which epoch is the best one."""

if __name__ == "__main__":
    config = settings("multi_label", "multi_label:network", (1, SIDE, SIDE))
    result = prune(config, network(), data=data, loss=loss, metrics=METRICS, distributed=False)
    print(result.summary["metrics"])
