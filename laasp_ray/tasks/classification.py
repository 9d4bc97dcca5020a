"""Classification by cross-entropy: the task of a run that names no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from laasp_ray.config import TrainConfig
from laasp_ray.errors import ConfigError
from laasp_ray.records import Metrics
from laasp_ray.tasks.base import Task


@dataclass(frozen=True)
class Classification(Task):
    """The cross-entropy of outputs (n, classes) and labels (n,) int64, with top-1 and top-5 (0 to 1) as metrics."""

    @property
    def primary(self) -> tuple[str, Literal["higher", "lower"]]:
        return "top1", "higher"

    @property
    def width(self) -> int:
        return 3

    @property
    def counts_hits(self) -> bool:
        return True

    def losses(self, model: nn.Module, inputs: Any, targets: Any) -> torch.Tensor:
        return self.losses_of(model(inputs), targets)

    def losses_of(self, outputs: Any, targets: Any) -> torch.Tensor:
        return functional.cross_entropy(outputs.float(), targets, reduction="none")

    def training_sum(
        self, outputs: Any, targets: Any, images: int, config: TrainConfig, teacher_outputs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        teacher_logits = None if teacher_outputs is None else teacher_outputs.float()
        losses = training_loss(outputs.float(), targets, config, teacher_logits)
        return losses, (outputs.detach().argmax(1) == targets).sum()

    def sums(self, model: nn.Module, inputs: Any, targets: Any) -> torch.Tensor:
        output = model(inputs).float()
        best = output.topk(min(5, output.shape[1]), dim=1).indices == targets[:, None]
        summed = functional.cross_entropy(output, targets, reduction="none").double().sum()
        return torch.stack([summed, best[:, :1].sum().double(), best.sum().double()])

    def metrics(self, sums: Sequence[float], images: int) -> Metrics:
        loss, top1, top5 = (value / images for value in sums)
        return Metrics(loss=loss, top1=top1, top5=top5, images=images)

    def trial(self, shape: Sequence[int]) -> tuple[Any, Any]:
        inputs, targets = super().trial(shape)
        return inputs, targets if self.data is not None else None

    def trial_fault(self, outputs: Any, images: int) -> str:
        if not isinstance(outputs, torch.Tensor):
            return _other_output(outputs)
        if outputs.ndim != 2 or len(outputs) != images:
            return (
                f"in training mode it gives a tensor of shape {tuple(outputs.shape)} for {images} images, must be "
                "(images, classes) as in eval mode"
            )
        return ""


def check_labels_fit(targets: Any, outputs: torch.Tensor) -> None:
    """Raises ConfigError unless the targets of an own data set are class indices of `outputs` (n, classes)."""
    if not isinstance(targets, torch.Tensor) or targets.dtype != torch.int64 or targets.shape != outputs.shape[:1]:
        is_tensor = isinstance(targets, torch.Tensor)
        given = f"{targets.dtype} of shape {tuple(targets.shape)}" if is_tensor else f"a {type(targets).__name__}"
        raise ConfigError(
            f"the targets of the own data set are {given}, but without a loss of your own the task is classification, "
            f"whose targets are int64 class indices of shape ({len(outputs)},): give a loss that takes these targets"
        )
    if int(targets.min()) < 0 or int(targets.max()) >= outputs.shape[1]:
        wrong = int(targets.min()) if int(targets.min()) < 0 else int(targets.max())
        raise ConfigError(
            f"a target of the own data set is {wrong}, but the network has {outputs.shape[1]} outputs, for classes 0 "
            f"to {outputs.shape[1] - 1}"
        )


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


def _other_output(output: Any) -> str:
    fields = getattr(output, "_fields", ())
    kind = f"{type(output).__name__}" + (f" ({', '.join(fields)})" if fields else "")
    return (
        f"in training mode it gives a {kind}, in eval mode one tensor. Losses on auxiliary outputs are not supported: "
        "build it without them (torchvision's GoogLeNet and Inception: model.arguments.aux_logits=False), or have its "
        "forward give the classes' outputs alone"
    )


CLASSIFICATION = Classification()
"""Classification of images, the default."""
