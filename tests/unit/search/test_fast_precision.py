"""Losses in bfloat16: near those in float32, for every way in which a candidate is measured, and the same choice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import randomise_batchnorm
from torch import nn

from laasp_ray.config import LaaspConfig, ModelConfig, SearchConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.models import build
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.search.candidates import NETWORK_BEFORE, measure_baseline, not_made_up, propose, tasks_of
from laasp_ray.search.compensating import CompensationMemory, Measured
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, LossTask, ready
from laasp_ray.search.executor import InProcessExecutor
from laasp_ray.search.grams import grams

CPU = torch.device("cpu")
DRAW = torch.Generator().manual_seed(0)
IMAGES = CalibrationSet(
    torch.randn(40, 3, 32, 32, generator=DRAW), torch.randint(10, (40,), generator=DRAW), batch_size=16
)
ALL = np.arange(len(IMAGES))


def tasks_for(model, compensated=False):
    model = ready(model, CPU)
    example = torch.zeros(1, 3, 32, 32)
    graph, macs = PruningGraph(model, example), count_macs(model, example)
    config = LaaspConfig(flops_reduction=0.5, step=0.05)
    made_up = not_made_up
    if compensated:
        measured = Measured(capture(model, Plan.empty()))
        made_up = CompensationMemory().at(model, graph, "full", measured, lambda _, some: grams(model, IMAGES, some, 0))
        made_up = made_up.made_up
    return tasks_of(propose(model, graph, macs, measure_baseline(graph, macs, config), config, made_up=made_up))


def network(builder):
    torch.manual_seed(0)
    model = build(ModelConfig(builder=builder, arguments={"num_classes": 10}, input_shape=(3, 32, 32)))
    randomise_batchnorm(model)
    return model


@pytest.mark.parametrize(
    ("builder", "compensated"),
    [("cifar.resnet20", False), ("cifar.resnet20", True), ("torchvision.mobilenet_v2", False)],
)
def test_fast_losses_are_near_the_full_ones(builder, compensated):
    model = network(builder)
    tasks = tasks_for(model, compensated)[-12:]
    engine = Engine(model, IMAGES, precision="bfloat16")
    assert all(engine.branch_points.cost(task).copied == "" for task in tasks)
    full, fast = engine.losses(tasks, ALL), engine.losses(tasks, ALL, fast=True)
    assert full.errors == fast.errors == {}
    assert full.values.tolist() == Engine(model, IMAGES).losses(tasks, ALL).values.tolist()
    off = np.abs(fast.values - full.values)
    assert off.max() > 0
    assert off.mean() < 0.02 * full.values.mean()


class GoesToFloat(nn.Module):
    """Its second layer gets float32 inputs, whatever the first one gives."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu().float()).mean((2, 3)))


def test_a_network_that_does_not_run_in_it_is_measured_in_full(caplog):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    model = GoesToFloat()
    tasks = [LossTask("a prune", Plan.empty(), {"second": (0, 3)}), NETWORK_BEFORE]
    engine = Engine(ready(model, CPU), IMAGES, precision="bfloat16")
    assert "losses are measured in float32, because the network does not run in torch.bfloat16: " in caplog.text
    full, fast = engine.losses(tasks, ALL), engine.losses(tasks, ALL, fast=True)
    assert fast.errors == {}
    assert fast.values.tolist() == full.values.tolist()


def test_the_choice_is_the_one_in_float32():
    model = network("cifar.resnet20")
    tasks = tasks_for(model)
    found = {}
    for precision in ("float32", "bfloat16"):
        search = SearchConfig(images=40, batch_size=16, precision=precision)
        executor = InProcessExecutor(model, replace(IMAGES), CPU, search, seed=0)
        network_now = capture(model, Plan.empty())
        results = executor.measure(network_now, tasks, lambda *_: None, lambda _: None)[:-1]
        kept = [place for place, result in enumerate(results) if result.dropped_at is None]
        found[precision] = min(kept, key=lambda place: results[place].loss), min(results[place].loss for place in kept)
    assert found["bfloat16"][0] == found["float32"][0]
    assert found["bfloat16"][1] == pytest.approx(found["float32"][1], rel=2e-2)
