"""Float32 means float32; what the driver found of a network holds for workers that compute less exactly."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import randomise_batchnorm
from plain_losses import loss_of_copy
from torch import nn
from torch.nn import functional

from laasp_ray.config import LaaspConfig, ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.distributed import executor as on_ray
from laasp_ray.errors import UnmaskedError
from laasp_ray.models import build
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.plan import Plan
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.engine import BranchPoints, Cost, Engine
from laasp_ray.search.evaluate import CalibrationSet, LossTask, pruned_copy, ready
from laasp_ray.search.precision import full_precision
from laasp_ray.search.schedule import Unit

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ALL = np.arange(4)


def rounded(tensor):
    """To TF32: 10 bits of mantissa, as tensor cores read float32."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.detach().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).view(tensor.shape)


@pytest.fixture
def tf32(monkeypatch):
    """Switches every convolution and linear layer to TF32 when it is called."""
    conv, linear = nn.Conv2d._conv_forward, functional.linear

    def switch():
        monkeypatch.setattr(
            nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: conv(self, rounded(x), rounded(weight), bias)
        )
        monkeypatch.setattr(
            functional, "linear", lambda x, weight, bias=None: linear(rounded(x), rounded(weight), bias)
        )

    return switch


def resnet(builder):
    torch.manual_seed(0)
    model = build(ModelConfig(builder=builder, arguments={"num_classes": 10}))
    model = ready(randomise_batchnorm(model), torch.device("cpu"))
    graph, macs = PruningGraph(model, IMAGES), count_macs(model, IMAGES)
    config = LaaspConfig(flops_reduction=0.5, criteria=("l1",), step=0.05)
    return model, tasks_of(propose(model, graph, macs, measure_baseline(graph, macs, config), config))


@pytest.mark.parametrize("builder", ["cifar.resnet56", "torchvision.resnet18"])
def test_a_worker_that_rounds_masks_what_the_driver_masked(builder, tf32):
    model, tasks = resnet(builder)
    tasks = [*tasks[:-1:7], tasks[-1]]
    calibration = CalibrationSet(IMAGES, torch.arange(4), 4)
    branch_points = BranchPoints(model, torch.zeros(1, 3, 16, 16))
    assert branch_points.untraced == ""
    assert not any(branch_points.cost(task).copied for task in tasks)
    tf32()
    light = [replace(task, step=Plan.empty()) for task in tasks]
    found = Engine(model, calibration, untraced=branch_points.untraced).losses(light, ALL)
    assert not found.errors
    losses = found.values.mean(1, dtype=np.float64)
    for task, loss in zip(tasks, losses, strict=True):
        assert loss == pytest.approx(loss_of_copy(model, task, calibration), rel=0.02), task.name
    # Not one is the network as it stands.
    assert np.abs(losses[:-1] - losses[-1]).min() > 0


def test_a_prune_without_a_plan_is_never_measured_as_the_unpruned_network():
    model, tasks = resnet("cifar.resnet20")
    light = replace(tasks[0], step=Plan.empty())
    assert not light.unpruned
    with pytest.raises(UnmaskedError, match="came without the plan"):
        pruned_copy(model, light)
    engine = Engine(model, CalibrationSet(IMAGES, torch.arange(4), 4), untraced="the driver says so")
    with pytest.raises(UnmaskedError, match="came without the plan"):
        engine.losses([light, tasks[-1]], ALL)


class InstantWorkers:
    """Workers that can measure where `able` says so of the inputs they are given; `asked` is what they were given."""

    slots = 2

    def __init__(self, able):
        self._able, self._done, self.asked = able, [], []

    def submit(self, job):
        inputs = job.arguments[0]
        self.asked.append(inputs)
        job.value, job.error = ("losses", None) if self._able(inputs) else (None, UnmaskedError("no mask here"))
        self._done.append(job)

    def collect(self):
        return self._done.pop(0)


def backend(able):
    workers = InstantWorkers(able)
    return on_ray.WorkersBackend(workers, ["light"], lambda: ["with plans"], [Cost(1, 1)] * 3), workers.asked


def test_a_worker_that_cannot_mask_is_sent_the_plans(caplog):
    made, asked = backend(lambda inputs: inputs == ["with plans"])
    units = [Unit((number,), ALL) for number in range(3)]
    for unit in units:
        made.submit(unit)
    with caplog.at_level(logging.WARNING):
        assert {made.collect()[0].tasks for _ in units} == {(0,), (1,), (2,)}
    assert asked == [["light"]] * 3 + [["with plans"]] * 3
    assert sum("cannot mask what the driver can" in record.message for record in caplog.records) == 1


def test_one_that_cannot_do_it_with_plans_ends_the_search():
    made, asked = backend(lambda inputs: False)
    made.submit(Unit((0,), ALL))
    with pytest.raises(UnmaskedError):
        made.collect()
    assert asked == [["light"], ["with plans"]]


def test_what_the_process_is_set_to_is_put_back():
    def settings():
        backends = torch.backends
        precise = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.conv]
        return [kind.fp32_precision for kind in (*precise, backends.mkldnn.matmul)]

    before = settings(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with pytest.raises(KeyError), full_precision():
        assert settings() == ["ieee"] * 5
        assert torch.backends.cudnn.deterministic
        raise KeyError
    assert (settings(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == before
    assert before[0][0] == "tf32"  # what PyTorch begins with, else this shows nothing


class Watching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, 4, 3), []

    def forward(self, x):
        self.seen.append(torch.backends.cudnn.conv.fp32_precision)
        return self.conv(x).mean((2, 3))


def test_losses_are_measured_in_full_precision():
    model = Watching().eval()
    calibration = CalibrationSet(IMAGES, torch.arange(4), 4)
    engine = Engine(model, calibration, untraced="to be seen")
    model.seen.clear()
    engine.losses([LossTask("as it stands", Plan.empty(), {})], ALL)
    loss_of_copy(model, LossTask("as it stands", Plan.empty(), {}), calibration)
    assert set(model.seen) == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
