"""A candidate's losses, image by image, are those of the physically pruned copy: a spread of the candidates of one
network a family by default; of the others, and all candidates, under the marker `exhaustive`."""

import functools

import numpy as np
import pytest
import torch
from plain_losses import loss_of_copy
from torch import nn
from torch.nn import functional

from laasp_ray.config import DEFAULT_CRITERIA, LaaspConfig, ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.models import build
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.plan import apply_plan
from laasp_ray.pruning.verify import clone_sharing_parameters, scramble
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, ready

SPREAD = 8
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NETWORKS = [
    "cifar.resnet20",
    *(
        f"torchvision.{name}"
        for name in (
            "resnet18",
            "resnet50",
            "mobilenet_v2",
            "vgg16_bn",
            "densenet121",
            "efficientnet_b0",
            "convnext_tiny",
            "regnet_y_400mf",
            "resnext50_32x4d",
        )
    ),
]
OTHERS_OF_A_FAMILY = {
    f"torchvision.{name}" for name in ("resnet18", "resnet50", "efficientnet_b0", "resnext50_32x4d", "vgg16_bn")
}
"""Of the families of resnet20, mobilenet_v2, regnet_y_400mf, and of the recipes' vgg16_cifar10."""


@functools.lru_cache(maxsize=1)
def prepared(builder, criteria):
    """A network at whose every channel something happens, the images' losses, and all candidates' tasks."""
    torch.manual_seed(0)
    model = build(ModelConfig(builder=builder, arguments={"num_classes": 10})).eval()
    scramble(model, IMAGES)
    graph, macs = PruningGraph(model, IMAGES), count_macs(model, IMAGES)
    config = LaaspConfig(flops_reduction=0.5, criteria=criteria)
    tasks = tasks_of(propose(model, graph, macs, measure_baseline(graph, macs, config), config))
    return ready(model, torch.device("cpu")), CalibrationSet(IMAGES, torch.arange(len(IMAGES)) % 10, 4), tasks


@torch.inference_mode()
def losses_of_copy(model, task, calibration):
    """Image by image, what `measure` gives the mean of."""
    pruned = clone_sharing_parameters(model)
    apply_plan(pruned, task.step)
    return functional.cross_entropy(pruned(calibration.images), calibration.labels, reduction="none").numpy()


def check(builder, model, calibration, tasks):
    """Compares the engine's losses of these tasks with copies', and says which were masked."""
    engine = Engine(model, calibration)
    found = engine.losses(tasks, np.arange(len(calibration)))
    assert not found.errors
    copied = []
    for task, losses in zip(tasks, found.values, strict=True):
        copied.append(engine.branch_points.cost(task).copied)
        assert losses.mean(dtype=np.float64) == pytest.approx(loss_of_copy(model, task, calibration), rel=1e-5), (
            task.name
        )
        np.testing.assert_allclose(
            losses, losses_of_copy(model, task, calibration), rtol=1e-4, atol=2e-5, err_msg=task.name
        )
    assert len({tuple(row) for row in found.values}) > len(tasks) // 2  # the prunes do tell
    if builder == "torchvision.convnext_tiny":
        norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
        assert {reason.removesuffix(" normalises over its channels") for reason in copied[:-1]} <= norms
    else:
        assert not any(copied)


@pytest.mark.parametrize(
    "builder",
    [
        pytest.param(builder, marks=pytest.mark.exhaustive if builder in OTHERS_OF_A_FAMILY else ())
        for builder in NETWORKS
    ],
)
def test_a_spread_of_candidates(builder):
    model, calibration, tasks = prepared(builder, ("l1",))
    spread = [tasks[position] for position in np.linspace(0, len(tasks) - 1, SPREAD + 1).round().astype(int)]
    check(builder, model, calibration, spread)  # the last is the network as it stands


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("builder", NETWORKS)
def test_every_candidate(builder):
    check(builder, *prepared(builder, DEFAULT_CRITERIA))
