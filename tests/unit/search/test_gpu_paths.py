"""What the search does on a GPU, as far as a CPU shows it: how often it waits, and what it counts as free."""

import contextlib

import numpy as np
import pytest
import torch
from helpers import randomise_batchnorm
from torch.utils._python_dispatch import TorchDispatchMode

from laasp_ray.config import LaaspConfig, ModelConfig, SearchConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.distributed import process
from laasp_ray.errors import ConfigError
from laasp_ray.models import build
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.search import engine
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.engine import Engine, branches_at_a_time, free_memory
from laasp_ray.search.evaluate import CalibrationSet, LossTask, ready
from laasp_ray.search.executor import InProcessExecutor
from laasp_ray.search.tracing import trace

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
IMAGES, LABELS = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = ready(randomise_batchnorm(build(ModelConfig(builder="cifar.resnet20"))), CPU)
    graph, macs = PruningGraph(model, IMAGES), count_macs(model, IMAGES)
    config = LaaspConfig(flops_reduction=0.5, step=0.05)
    return model, tasks_of(propose(model, graph, macs, measure_baseline(graph, macs, config), config))


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: values that are read."""

    def __init__(self):
        super().__init__()
        self.read = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.read += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("joint", [1, 4])
def test_a_chunk_of_images_waits_for_the_device_once(resnet, joint, monkeypatch):
    model, tasks = resnet
    measuring = Engine(model, CalibrationSet(IMAGES, LABELS, 4))
    monkeypatch.setattr(Engine, "_sizes", lambda *_, **__: (4, joint))
    expected = measuring.losses(tasks, np.arange(8)).values
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or cpu(tensor))
    with Waits() as waits:
        found = measuring.losses(tasks, np.arange(8)).values
    assert np.array_equal(found, expected)
    assert copies == [(len(tasks), 4)] * 2
    assert waits.read == 0


def test_the_search_never_gives_up_torchs_memory(resnet, monkeypatch):
    model, tasks = resnet
    emptied = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    search = SearchConfig(images=8, batch_size=2, racing="off", candidates_per_task=3)
    executor = InProcessExecutor(model, CalibrationSet(IMAGES, LABELS, 2), CPU, search, 0)
    results = executor.measure(capture(model, Plan.empty()), tasks, lambda *_: None, lambda share: None)
    assert len(results) == len(tasks)
    assert emptied == []


def test_memory_that_torch_keeps_for_later_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10_000)
    assert free_memory(GPU) == engine.FREE_MEMORY_SHARE * 70_000


def test_branches_run_together_as_memory_and_indices_allow():
    assert branches_at_a_time(100, 30, 1000) == 3
    assert branches_at_a_time(10, 30, 1000) == 1
    # 250 images of 256 channels at 56 x 56: ten of them reach 2.007e9 elements, eleven 2.208e9.
    assert branches_at_a_time(10**9, 1, 250 * 256 * 56 * 56) == 10
    assert branches_at_a_time(10**9, 1, 2**31) == 1


def test_the_largest_value_of_a_branch_is_counted(resnet):
    model, _ = resnet
    program = Engine(model, CalibrationSet(IMAGES, LABELS, 8)).branch_points.program
    of = {
        layer: program.largest_value([program.branch_point({layer})])
        for layer in ("layer1.0.conv2", "layer3.2.conv2", "fc" if hasattr(model, "fc") else "linear")
    }
    assert list(of.values()) == [16 * 16 * 16, 64 * 4 * 4, 10]
    assert program.largest_value([program.branch_point({name}) for name in of]) == 16 * 16 * 16


class Watching(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.seen = torch.nn.Conv2d(3, 4, 3), []

    def forward(self, x):
        cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
        self.seen.append((cudnn.conv.fp32_precision, cuda.matmul.fp32_precision, mkldnn.conv.fp32_precision))
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize(("precision", "seen"), [("float32", ("ieee",) * 3), ("tf32", ("tf32", "tf32", "ieee"))])
def test_losses_are_measured_in_the_precision_of_the_config(precision, seen, monkeypatch):
    model, task = Watching().eval(), LossTask("as it stands", Plan.empty(), {})
    calibration = CalibrationSet(IMAGES, LABELS % 4, 4)
    search = SearchConfig(images=8, batch_size=4, precision=precision)
    made, _ = process._engine(model, calibration, search, [task], "to be seen")
    model.seen.clear()
    made.losses([task], np.arange(8))
    assert set(model.seen) == {seen}
    # The same in this process.
    used = []
    monkeypatch.setattr(Engine, "losses", lambda self, *_: used.append(self._precision) or stop())
    executor = InProcessExecutor(model, calibration, CPU, search, 0)
    with contextlib.suppress(ZeroDivisionError):
        executor.measure(capture(model, Plan.empty()), [task], lambda *_: None, lambda share: None)
    assert used == [precision]


def stop():
    raise ZeroDivisionError


def test_another_precision_is_refused():
    with pytest.raises(ConfigError, match=r"search\.precision is 'bf16', must be one of 'float32', 'tf32', 'bfloat16'"):
        SearchConfig(precision="bf16")


def test_a_gpu_that_torch_cannot_use_is_not_replaced_by_the_cpu(monkeypatch):
    monkeypatch.setattr(process.ray, "get_gpu_ids", lambda: [1])
    monkeypatch.setattr(process.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"node 10\.0\.0\.7: .* cannot use one"):
        process.device()


def test_a_search_worker_enters_its_own_gpu(monkeypatch):
    entered = []
    monkeypatch.setattr(process.ray, "get_gpu_ids", lambda: [3])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", entered.append)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert process.enter_device() == torch.device("cuda", 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert process.enter_device() == torch.device("cuda", 1)
    assert entered == [torch.device("cuda", 3), torch.device("cuda", 1)]


class SharedFirst(torch.nn.Module):
    """The first operand of its product is a value that all branches share; the product takes on its format."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.head, self.tail = (torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))

    def forward(self, x):
        first = self.stem(x)
        return self.tail(first * self.head(self.inner(first))).mean((2, 3))


@pytest.mark.parametrize("joint", [1, 3])
def test_branches_that_run_together_stay_channels_last(joint, monkeypatch):
    images = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    program = trace(ready(SharedFirst(), CPU), images)
    masks = [{"head": (number,)} for number in range(joint)]
    formats, run = [], torch.nn.Conv2d._conv_forward

    def seen(module, inputs, weight, bias):
        formats.append(inputs.is_contiguous(memory_format=torch.channels_last))
        return run(module, inputs, weight, bias)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", seen)
    [(_, _, outputs)] = program.run(images, {program.branch_point({"head"}): [masks]}, whole=False)
    assert outputs.shape == (2 * joint, 8)
    assert len(formats) == 3 + joint + 1  # stem, inner and head; head for each mask; tail for all
    assert all(formats)
