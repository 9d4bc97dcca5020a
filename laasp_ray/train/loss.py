"""The loss that training minimises."""

from __future__ import annotations

import torch
from torch.nn import functional

from laasp_ray.config import TrainConfig


def training_loss(
    output: torch.Tensor, labels: torch.Tensor, config: TrainConfig, teacher_logits: torch.Tensor | None = None
) -> torch.Tensor:
    """The smoothed cross-entropy, summed over the images, for outputs (images, classes) and labels (images,).

    `teacher_logits` are a teacher's outputs for the same images. With them the loss is (1 - distill) times the
    cross-entropy plus distill * T^2 times the divergence KL(teacher || student) of the softmax at temperature T.
    Source: Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015 (arXiv 1503.02531).
    """
    cross_entropy = functional.cross_entropy(output, labels, reduction="sum", label_smoothing=config.label_smoothing)
    if teacher_logits is None:
        return cross_entropy
    temperature = config.distill_temperature
    ours, theirs = ((logits / temperature).log_softmax(1) for logits in (output, teacher_logits))
    imitation = functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    return (1 - config.distill) * cross_entropy + config.distill * temperature**2 * imitation
