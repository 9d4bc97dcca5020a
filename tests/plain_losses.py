"""What a prune costs the network, by the plain procedure that the engine's is compared with."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from laasp_ray.models.untouched import in_eval_mode
from laasp_ray.search.evaluate import CalibrationSet, LossTask, pruned_copy
from laasp_ray.search.precision import full_precision


@full_precision()
@torch.inference_mode()
def mean_loss(model: nn.Module, calibration: CalibrationSet) -> float:
    """Mean cross-entropy of `model` in eval mode; model and calibration set on one device. Its modules' modes are put
    back."""
    total = torch.zeros((), dtype=torch.float64, device=calibration.labels.device)
    with in_eval_mode(model):
        for images, labels in calibration.batches():
            total += functional.cross_entropy(model(images).float(), labels, reduction="none").double().sum()
    return float(total) / len(calibration)


def loss_of_copy(model: nn.Module, task: LossTask, calibration: CalibrationSet) -> float:
    """The loss of a physically pruned copy of `model`."""
    return mean_loss(pruned_copy(model, task), calibration)
