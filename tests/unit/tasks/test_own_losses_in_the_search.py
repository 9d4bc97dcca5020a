"""Losses of the user's own in the search's engine: with parameters, with operations in place, and with errors."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from laasp_ray.pruning.channels import plan_of
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.masking import mask_of
from laasp_ray.search.candidates import NETWORK_BEFORE
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, LossTask
from laasp_ray.tasks import OutputLossTask

IMAGES = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])


class Weighted(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, outputs, targets):
        return functional.cross_entropy(outputs, targets, reduction="none") * self.scale


def in_place(outputs, targets):
    return outputs.sub_(outputs.mean(1, keepdim=True)).square_().mean(1)


def fails_without_filter(outputs, targets):
    if bool((outputs == 0).all()):
        raise RuntimeError("nothing is left to compare")
    return outputs.mean(1)


def engine_of(model, loss):
    task = OutputLossTask(None, loss=loss, metrics_by_name={})
    return Engine(model, CalibrationSet(IMAGES, LABELS, 2, task=task))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()


def task_without(model, filters):
    removal = PruningGraph(model, IMAGES[:1]).removal("0", filters)
    return LossTask("without", plan_of(removal), mask_of(removal))


@pytest.mark.parametrize("loss", [Weighted(), in_place])
def test_losses_with_parameters_and_operations_in_place(loss):
    model = network()
    found = engine_of(model, loss).losses([NETWORK_BEFORE, task_without(model, (0,))], np.arange(4))
    assert not found.errors
    with torch.no_grad():
        expected = loss(model(IMAGES), LABELS)
    np.testing.assert_allclose(found.values[0], expected.numpy(), rtol=1e-5)


def test_an_error_of_the_loss_is_the_candidate_s_and_others_are_measured():
    model = network()
    with torch.no_grad():
        model[4].bias.zero_()
        model[4].weight[:, 1:] = 0  # the outputs are those of the first filter
    tasks = [NETWORK_BEFORE, task_without(model, (0,)), task_without(model, (2,))]
    found = engine_of(model, fails_without_filter).losses(tasks, np.arange(4))
    assert list(found.errors) == [1] and "nothing is left to compare" in found.errors[1]
    assert np.isnan(found.values[1]).all() and np.isfinite(found.values[[0, 2]]).all()
