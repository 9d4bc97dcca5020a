"""Detection: where is which digit? torchvision's SSD with the head of SSDLite, on a small backbone.

The network computes its own loss, so the run's loss is one of (model, batch).

    python examples/detection.py
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from scenes import DIGIT, Scenes
from settings import settings
from torch import nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import box_iou

from laasp_ray import prune
from laasp_ray.tasks import OwnData

PICTURE = 64
"""A picture of the scenes, twice enlarged."""
CLASSES = 3
"""Background (torchvision's class 0), the digits 0 to 4, the digits 5 to 9."""
Target = dict[str, torch.Tensor]


class Boxes(Scenes):
    """Item: a picture (3, 64, 64), and its `boxes` (n, 4) as x1, y1, x2, y2 in pixels with their `labels` (n,)."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        scene = self.scene(index)
        picture = torch.from_numpy(scene.picture).repeat_interleave(2, 1).repeat_interleave(2, 2)
        corners = torch.from_numpy(scene.corners).float() * 2
        target = {
            "boxes": torch.cat([corners, corners + 2 * DIGIT], 1),
            "labels": 1 + torch.from_numpy(scene.labels) // 5,
        }
        return picture.expand(3, -1, -1).clone(), target


def data(split: str, images: int = 2000) -> Boxes:
    return Boxes(split, images if split == "train" else images // 5)


def collate(examples: list[tuple[torch.Tensor, Target]]) -> tuple[torch.Tensor, list[Target]]:
    """Pictures differ in their number of boxes, which torch's default cannot stack: targets stay a list."""
    return torch.stack([picture for picture, _ in examples]), [target for _, target in examples]


class Backbone(nn.Module):
    """Two maps of features, 8 x 8 and 4 x 4 of a picture of 64 x 64."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_step(3, 16), _step(16, 24), _step(24, 32))
        self.deep = _step(32, 48)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        fine = self.stem(images)
        return OrderedDict(fine=fine, coarse=self.deep(fine))


def _step(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def network() -> SSD:
    anchors = DefaultBoxGenerator([[], []], scales=[0.25, 0.35, 0.45])
    head = SSDLiteHead([32, 48], anchors.num_anchors_per_location(), CLASSES, partial(nn.BatchNorm2d, eps=1e-3))
    mean, std = [0.0] * 3, [1.0] * 3
    return SSD(
        Backbone(), anchors, (PICTURE, PICTURE), CLASSES, head=head, image_mean=mean, image_std=std, score_thresh=0.05
    )


def loss(model: SSD, batch: tuple[torch.Tensor, Sequence[Target]]) -> torch.Tensor:
    """SSD's own loss, of each picture alone, in whatever mode the network is.

    `model(images, targets)` would give it in training mode only, in which BatchNorm's statistics change, and divided by
    the boxes of the whole batch.
    """
    pictures, targets = batch
    images, _ = model.transform(list(pictures))  # targets are in pixels of the pictures, which keep their size
    features = list(model.backbone(images.tensors).values())
    outputs = model.head(features)
    anchors = model.anchor_generator(images, features)
    losses = []
    for number, (target, boxes) in enumerate(zip(targets, anchors, strict=True)):
        matched = model.proposal_matcher(box_iou(target["boxes"], boxes))
        own = {name: tensor[number : number + 1] for name, tensor in outputs.items()}
        found = model.compute_loss([target], own, [boxes], [matched])
        losses.append(found["bbox_regression"] + found["classification"])
    return torch.stack(losses)


class AveragePrecision:
    """The mean over classes of the average precision at an IoU of 0.5, with scores cut into bins.

    Right and wrong detections are counted by the bin of their score, and the boxes that there are. Such counts add up
    over batches and ranks, and with 100 bins the value is close to that of sorted scores.
    """

    higher_is_better = True
    bins = 100

    @property
    def width(self) -> int:
        return (CLASSES - 1) * (2 * self.bins + 1)

    def sums(self, outputs: Sequence[Mapping[str, torch.Tensor]], targets: Sequence[Target]) -> torch.Tensor:
        counts = torch.zeros(CLASSES - 1, 2 * self.bins + 1, dtype=torch.float64)
        for found, target in zip(outputs, targets, strict=True):
            for number in range(1, CLASSES):
                there = target["boxes"][target["labels"] == number].cpu()
                counts[number - 1, -1] += len(there)
                chosen = found["labels"] == number
                self._count(counts[number - 1], found["boxes"][chosen].cpu(), found["scores"][chosen].cpu(), there)
        return counts.flatten()

    def _count(self, counts: torch.Tensor, boxes: torch.Tensor, scores: torch.Tensor, there: torch.Tensor) -> None:
        free = torch.ones(len(there), dtype=torch.bool)
        for place in scores.argsort(descending=True, stable=True).tolist():
            overlaps = box_iou(boxes[place : place + 1], there)[0] * free if len(there) else torch.zeros(1)
            right = float(overlaps.max()) >= 0.5
            if right:
                free[int(overlaps.argmax())] = False
            bin_ = min(self.bins - 1, int(scores[place] * self.bins))
            counts[bin_ + (0 if right else self.bins)] += 1

    def value(self, sums: torch.Tensor) -> float:
        counts = sums.reshape(CLASSES - 1, -1)
        right, wrong = (part.flip(1).cumsum(1) for part in (counts[:, : self.bins], counts[:, self.bins : -1]))
        recall = right / counts[:, -1:].clamp(min=1)
        precision = right / (right + wrong).clamp(min=1)
        best_from_here = precision.flip(1).cummax(1).values.flip(1)
        gained = torch.diff(recall, dim=1, prepend=torch.zeros(len(recall), 1, dtype=recall.dtype))
        return float((gained * best_from_here).sum(1).mean())


METRICS: dict[str, Any] = {"AP50": AveragePrecision}

if __name__ == "__main__":
    config = settings("detection", "detection:network", (3, PICTURE, PICTURE), learning_rate=0.02)
    own = OwnData(data, collate=collate)
    result = prune(config, network(), data=own, loss=loss, metrics=METRICS, distributed=False)
    print(result.summary["metrics"])
