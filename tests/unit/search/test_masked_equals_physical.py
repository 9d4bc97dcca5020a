"""A candidate's losses, image by image, are those of the physically pruned copy: a spread of the candidates of one
network a family by default; of the others, and all candidates, under the marker `exhaustive`."""

import functools

import numpy as np
import pytest
import torch
from plain_losses import loss_of_copy
from torch.nn import functional

from laasp_ray.config import COMPENSATED_CRITERIA, DEFAULT_CRITERIA, LaaspConfig, ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.models import build
from laasp_ray.pruning.compensation import apply_compensated
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.pruning.verify import clone_sharing_parameters, scramble
from laasp_ray.search.candidates import counts_of, measure_baseline, not_made_up, propose, tasks_of
from laasp_ray.search.compensating import CompensationMemory, Measured
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, ready
from laasp_ray.search.grams import grams

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
def prepared(builder, criteria, compensate="off"):
    """A network at whose every channel something happens, the images' losses, and all candidates' tasks."""
    torch.manual_seed(0)
    model = build(ModelConfig(builder=builder, arguments={"num_classes": 10})).eval()
    scramble(model, IMAGES)
    graph, macs = PruningGraph(model, IMAGES), count_macs(model, IMAGES)
    config = LaaspConfig(flops_reduction=0.5, criteria=criteria, compensate=compensate)
    calibration = CalibrationSet(IMAGES, torch.arange(len(IMAGES)) % 10, 4)
    baseline, made_up, norms, given = measure_baseline(graph, macs, config), not_made_up, None, {}
    if compensate != "off":
        compensator = CompensationMemory().at(
            model,
            graph,
            compensate,
            Measured(capture(model, Plan.empty())),
            lambda network, readers: grams(model, calibration, readers),
        )
        made_up, norms = compensator.made_up, compensator.norms
        if "obs" in criteria:
            given = {"obs": compensator.obs_scores(model, graph, counts_of(graph, macs, baseline, config))}
    tasks = tasks_of(propose(model, graph, macs, baseline, config, given, made_up=made_up))
    return ready(model, torch.device("cpu")), calibration, tasks, norms


@torch.inference_mode()
def losses_of_copy(model, task, calibration, norms):
    """Image by image, what `measure` gives the mean of: of the network as a run would prune it."""
    pruned = clone_sharing_parameters(model)
    apply_compensated(pruned, task.step, task.made_up, norms)
    return functional.cross_entropy(pruned(calibration.images), calibration.labels, reduction="none").numpy()


def check(builder, model, calibration, tasks, norms):
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
            losses, losses_of_copy(model, task, calibration, norms), rtol=1e-4, atol=2e-5, err_msg=task.name
        )
    assert len({tuple(row) for row in found.values}) > len(tasks) // 2  # the prunes do tell
    assert not any(copied)


@pytest.mark.parametrize(
    "builder",
    [
        pytest.param(builder, marks=pytest.mark.exhaustive if builder in OTHERS_OF_A_FAMILY else ())
        for builder in NETWORKS
    ],
)
@pytest.mark.parametrize("compensate", ["off", "full"])
def test_a_spread_of_candidates(builder, compensate):
    model, calibration, tasks, norms = prepared(builder, ("l1",), compensate)
    spread = [tasks[position] for position in np.linspace(0, len(tasks) - 1, SPREAD + 1).round().astype(int)]
    assert compensate == "off" or all(task.made_up for task in spread[:-1])
    check(builder, model, calibration, spread, norms)  # the last is the network as it stands


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("compensate", ["off", "channels", "full"])
@pytest.mark.parametrize("builder", NETWORKS)
def test_every_candidate(builder, compensate):
    criteria = DEFAULT_CRITERIA if compensate == "off" else COMPENSATED_CRITERIA
    check(builder, *prepared(builder, criteria, compensate))
