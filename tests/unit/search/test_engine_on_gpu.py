"""The search on a GPU: branches of one place run as one batch there."""

import numpy as np
import pytest
import torch
from helpers import randomise_batchnorm
from plain_losses import loss_of_copy

from laasp_ray.config import LaaspConfig, ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.models import build
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, ready

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("builder", ["cifar.resnet20", "torchvision.resnet50", "torchvision.mobilenet_v2"])
def test_losses_are_those_of_pruned_copies_within_the_memory_allowed(builder, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = randomise_batchnorm(build(ModelConfig(builder=builder, arguments={"num_classes": 10}))).eval()
    example, device = torch.randn(1, 3, 32, 32), torch.device("cuda")
    graph, macs = PruningGraph(model, example), count_macs(model, example)
    config = LaaspConfig(flops_reduction=0.5)
    tasks = tasks_of(propose(model, graph, macs, measure_baseline(graph, macs, config), config))
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    calibration = CalibrationSet(images, (torch.arange(64) % 10).to(device), 64)
    network, bound = ready(model, device), 200_000_000
    engine = Engine(network, calibration, memory_bytes=bound)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = engine.losses(tasks, np.arange(64))
    assert torch.cuda.max_memory_allocated() - held <= 2 * bound  # the library's own workspace comes on top
    assert not found.errors
    for position in range(0, len(tasks), 7):
        expected = loss_of_copy(network, tasks[position], calibration)
        assert found.values[position].mean() == pytest.approx(expected, rel=1e-5)
