"""MobileNet v1, for images of 224 x 224."""

from __future__ import annotations

import torch
from torch import nn

MOBILENET_V1_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)
"""Output channels and stride of each depthwise separable block (Howard et al. 2017, table 1)."""


class MobileNetV1(nn.Module):
    """MobileNet v1: a 3x3 convolution, then alternating depthwise and 1x1 convolutions, each with BatchNorm
    and ReLU.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        blocks = [_convolution(3, 32, 3, stride=2)]
        inputs = 32
        for outputs, stride in MOBILENET_V1_BLOCKS:
            blocks.append(
                nn.Sequential(
                    _convolution(inputs, inputs, 3, stride=stride, groups=inputs), _convolution(inputs, outputs, 1)
                )
            )
            inputs = outputs
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


def _convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
