"""Semantic segmentation: which pixels belong to which kind of digit? A small U-Net, and torchvision's LR-ASPP.

python examples/segmentation.py            # the U-Net
python examples/segmentation.py lraspp
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace

import torch
from scenes import DIGIT, SIDE, Scenes
from settings import settings
from torch import nn
from torch.nn import functional
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from laasp_ray import prune
from laasp_ray.tasks import OwnData

CLASSES = 3
"""Background, the digits 0 to 4, the digits 5 to 9."""
INK = 0.3
"""A pixel at least so bright belongs to a digit."""


class Masks(Scenes):
    """Item: a picture (3, 32, 32), three times grey, and the class of every pixel (32, 32), int64; `scale` times larger
    on each side.
    """

    def __init__(self, split: str, count: int, scale: int) -> None:
        super().__init__(split, count)
        self._scale = scale

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        scene = self.scene(index)
        mask = torch.zeros(SIDE, SIDE, dtype=torch.int64)
        picture = torch.from_numpy(scene.picture)
        for label, (x, y) in zip(scene.labels.tolist(), scene.corners.tolist(), strict=True):
            part = (slice(y, y + DIGIT), slice(x, x + DIGIT))
            mask[part][picture[0][part] >= INK] = 1 + label // 5
        return self._larger(picture).expand(3, -1, -1).clone(), self._larger(mask)

    def _larger(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.repeat_interleave(self._scale, -2).repeat_interleave(self._scale, -1)


def data(split: str, images: int = 1000, scale: int = 1) -> Masks:
    return Masks(split, images if split == "train" else images // 5, scale)


class UNet(nn.Module):
    """Two steps down, two up, with the connections across that coupled channels come from."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.second = _double(3, width), _double(width, 2 * width)
        self.bottom = _double(2 * width, 4 * width)
        self.up_second, self.up_first = _double(6 * width, 2 * width), _double(3 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.first(images)
        second = self.second(functional.max_pool2d(first, 2))
        bottom = self.bottom(functional.max_pool2d(second, 2))
        second = self.up_second(torch.cat([functional.interpolate(bottom, scale_factor=2.0), second], 1))
        first = self.up_first(torch.cat([functional.interpolate(second, scale_factor=2.0), first], 1))
        return self.head(first)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (inputs, outputs):
        layers += [nn.Conv2d(before, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def unet(width: int = 12) -> nn.Module:
    return UNet(width)


def lraspp() -> nn.Module:
    """LR-ASPP, which gives a dictionary: the loss below takes its `out`.

    Its BatchNorm layers average over a hundred steps, more than three epochs here have: they get torch's default.
    """
    network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return network


def _logits(outputs: torch.Tensor | Mapping[str, torch.Tensor]) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs["out"]


def loss(outputs: torch.Tensor | Mapping[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """One value for each picture: the mean over its pixels, where digits count four times as much."""
    logits = _logits(outputs)
    weights = torch.tensor([1.0, 4.0, 4.0], device=logits.device)
    return functional.cross_entropy(logits, targets, weights, reduction="none").flatten(1).mean(1)


class MeanIoU:
    """The mean intersection over union of the classes, from counts of pixels over all pictures."""

    higher_is_better = True
    width = 2 * CLASSES

    def sums(self, outputs: torch.Tensor | Mapping[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        found = _logits(outputs).argmax(1)
        pairs = [(found == number, targets == number) for number in range(CLASSES)]
        return torch.stack([count for a, b in pairs for count in ((a & b).sum(), (a | b).sum())])

    def value(self, sums: torch.Tensor) -> float:
        both, either = sums.reshape(CLASSES, 2).T
        return float((both / either.clamp(min=1)).mean())


METRICS = {"mIoU": MeanIoU}

if __name__ == "__main__":
    name = "lraspp" if sys.argv[1:] == ["lraspp"] else "unet"
    model = lraspp() if name == "lraspp" else unet()
    scale = 2 if name == "lraspp" else 1  # LR-ASPP's finest map has an eighth of the picture's side
    config = settings(f"segmentation_{name}", f"segmentation:{name}", (3, scale * SIDE, scale * SIDE))
    if name == "lraspp":
        # Squeeze-and-excitation layers have no FLOPs to give, and are harmless to prune: they would be chosen first.
        squeezes = [layer for layer, _ in model.named_modules() if layer.endswith((".fc1", ".fc2"))]
        schedule = replace(config.train, epochs=8, prune_epoch=6)
        config = replace(config, train=schedule, prune=replace(config.prune, step=0.1, ignored=tuple(squeezes)))
    own = OwnData(data, {"scale": scale})
    result = prune(config, model, data=own, loss=loss, metrics=METRICS, distributed=False)
    print(result.summary["metrics"])
