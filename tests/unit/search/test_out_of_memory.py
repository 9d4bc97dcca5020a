"""Memory that runs out is the device's fault, never a candidate's: less is tried, then the search ends."""

import math

import numpy as np
import pytest
import torch
from test_engine import Scaled
from torch import nn

from laasp_ray.config import LaaspConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.criteria.pls import Pls
from laasp_ray.errors import MemoryShortError, SearchError, is_out_of_memory
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.search import rank
from laasp_ray.search.activations import ImportanceRequest, importance
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, ready

IMAGES = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(9) % 5
ALL = np.arange(9)
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("could not create a primitive"),  # seen from a convolution under RLIMIT_AS
    MemoryError(),
]


class Tight(nn.Conv2d):
    """Raises `error` in the calls of which `fails`(how many calls there were, images) says so; in all copies."""

    error, calls, sizes = ERRORS[0], 0, []

    @staticmethod
    def fails(call, images):
        return False

    def forward(self, x):
        Tight.calls += 1
        Tight.sizes.append(len(x))
        if Tight.fails(Tight.calls, len(x)):
            raise Tight.error
        return super().forward(x)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(Tight, "fails", staticmethod(lambda call, images: False))


def network(masked=True):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6) if masked else Scaled(2, 6)
    layers = (nn.Conv2d(3, 6, 3), norm, nn.ReLU(), Tight(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten())
    return ready(nn.Sequential(*layers, nn.Linear(96, 5)), torch.device("cpu"))


def prepared(masked, batch_size=9):
    model, calibration = network(masked), CalibrationSet(IMAGES, LABELS, batch_size)
    graph, macs = PruningGraph(model, IMAGES), count_macs(model, IMAGES)
    config = LaaspConfig(flops_reduction=0.5, criteria=("l1",), step=0.05)
    tasks = tasks_of(propose(model, graph, macs, measure_baseline(graph, macs, config), config))
    return Engine(model, calibration), tasks


@pytest.mark.parametrize("masked", [True, False], ids=["branches", "copies"])
@pytest.mark.parametrize(
    "error",
    [ERRORS[0], ERRORS[-1], *(pytest.param(error, marks=pytest.mark.exhaustive) for error in ERRORS[1:-1])],
    ids=lambda error: type(error).__name__,
)
def test_once_out_of_memory_changes_no_loss(masked, error, monkeypatch):
    engine, tasks = prepared(masked)
    wanted = engine.losses(tasks, ALL)
    Tight.calls = 0
    engine.losses(tasks, ALL)
    calls = Tight.calls
    for failing in range(1, calls + 1):
        Tight.calls = 0
        monkeypatch.setattr(Tight, "error", error)
        monkeypatch.setattr(Tight, "fails", staticmethod(lambda call, images, at=failing: call == at))
        found = engine.losses(tasks, ALL)
        assert Tight.calls > calls
        assert not found.errors
        np.testing.assert_allclose(found.values, wanted.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [True, False], ids=["branches", "copies"])
def test_fewer_images_at_a_time_where_more_do_not_fit(masked, monkeypatch):
    engine, tasks = prepared(masked)
    wanted = engine.losses(tasks, ALL)
    monkeypatch.setattr(Tight, "sizes", [])
    monkeypatch.setattr(Tight, "fails", staticmethod(lambda call, images: images > 2))
    found = engine.losses(tasks, ALL)
    assert not found.errors
    assert {1, 2} & set(Tight.sizes)
    np.testing.assert_allclose(found.values, wanted.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [True, False], ids=["branches", "copies"])
def test_memory_that_is_short_for_one_image_ends_the_search(masked, monkeypatch):
    engine, tasks = prepared(masked)
    engine.losses(tasks, ALL)
    monkeypatch.setattr(Tight, "error", ERRORS[0])
    monkeypatch.setattr(Tight, "fails", staticmethod(lambda call, images: True))
    with pytest.raises(SearchError, match=r"single image .*CUDA out of.*search\.memory_mb or search\.batch_size"):
        engine.losses(tasks, ALL)


@pytest.mark.parametrize("racing", [False, True])
def test_the_choice_is_the_same_when_memory_ran_out_once(racing, monkeypatch):
    def entries(ranking):
        return [(entry.layer, entry.filters, pytest.approx(entry.loss, rel=1e-5), entry.error) for entry in ranking]

    wanted = entries(rank(network(), IMAGES, LABELS, step=0.05, racing=racing))
    Tight.calls = 0
    rank(network(), IMAGES, LABELS, step=0.05, racing=racing)
    last = Tight.calls
    for failing in (last // 2, last - 5, last):
        Tight.calls = 0
        monkeypatch.setattr(Tight, "fails", staticmethod(lambda call, images, at=failing: call == at))
        found = rank(network(), IMAGES, LABELS, step=0.05, racing=racing)
        assert entries(found) == wanted
        assert math.isfinite(found[-1].loss)


def test_what_scores_filters_is_tried_again_and_names_the_batch(monkeypatch):
    model, calibration = network(), CalibrationSet(IMAGES, LABELS, 4)
    wanted = ImportanceRequest(("3",), "pls", Pls(2, "max"))
    undisturbed = importance(model, calibration, wanted)
    Tight.calls = 0
    monkeypatch.setattr(Tight, "fails", staticmethod(lambda call, images: call == 2))
    assert torch.equal(importance(model, calibration, wanted)["3"], undisturbed["3"])
    monkeypatch.setattr(Tight, "fails", staticmethod(lambda call, images: True))
    with pytest.raises(MemoryShortError, match=r"a batch of 4 images.*lower search\.batch_size"):
        importance(model, calibration, wanted)


def test_other_errors_are_not_taken_for_it():
    assert all(is_out_of_memory(error) for error in ERRORS)
    for error in (RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("memory")):
        assert not is_out_of_memory(error)
