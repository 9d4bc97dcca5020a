"""Networks that do not run channels last, and networks that keep what they computed, are searched like any other."""

import copy

import numpy as np
import pytest
import torch
from helpers import randomise_batchnorm
from torch import nn
from torch.nn import functional

from laasp_ray.config import LaaspConfig, SearchConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.models.copying import deep_copy
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import capture, rebuild
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.pruning.verify import clone_sharing_parameters
from laasp_ray.search import rank
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, ready_with
from laasp_ray.search.executor import InProcessExecutor

IMAGES = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 4


class Viewing(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 5, 3, padding=1), nn.Linear(180, 4)

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu()).relu()
        return self.head(x.view(x.size(0), -1))


class Keeping(Viewing):
    """Keeps what it computed, as networks do whose activations are looked at."""

    def __init__(self):
        super().__init__()
        self.maps = {"all": []}

    def forward(self, x):
        self.last = self.first(x)
        x = self.second(self.norm(self.last).relu()).relu()
        self.maps["all"] = [x]
        return self.head(x.flatten(1))


class ReadsMap(Viewing):
    """Its linear layer reads a map with channels last, place by place."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu()).relu()
        return self.head(x.permute(0, 2, 3, 1)).mean((1, 2))


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv3d(3, 6, 3, padding=1), nn.Conv3d(6, 5, 1), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).mean((2, 3, 4)))


def by_cutting(model, images, ranking):
    """The losses of networks that are cut, by plain torch in its own format."""
    graph = PruningGraph(model, images)
    for entry in ranking:
        pruned = clone_sharing_parameters(model).eval()
        apply_plan(pruned, graph.step(entry.layer, entry.filters))
        with torch.no_grad():
            yield functional.cross_entropy(pruned(images), LABELS).item()


@pytest.mark.parametrize("memory_mb", [0, 1])
@pytest.mark.parametrize("kind", [Viewing, Keeping, ReadsMap, Volumes])
def test_losses_are_those_of_cut_networks(kind, memory_mb):
    model = randomise_batchnorm(kind())
    images = IMAGES if kind is not Volumes else torch.randn(6, 3, 4, 4, 4)
    model(images)  # in training, so that what it keeps has a history
    ranking = rank(model, images, LABELS, step=0.1, memory_mb=memory_mb, compensate="off")
    assert {entry.layer for entry in ranking} == {"first", "second"}
    assert not any(entry.copied or entry.error for entry in ranking)
    for entry, loss in zip(ranking, by_cutting(model, images, ranking), strict=True):
        assert entry.loss == pytest.approx(loss, rel=1e-5)


def test_only_a_network_that_does_not_run_channels_last_is_run_otherwise():
    calibration = CalibrationSet(IMAGES, LABELS, 4)
    for kind, last in ((Viewing, False), (Keeping, True)):
        model, fitted = ready_with(kind(), calibration)
        assert fitted.at(np.arange(4))[0].is_contiguous(memory_format=torch.channels_last) == last
        assert model.first.weight.is_contiguous(memory_format=torch.channels_last) == last
        assert not model.training


def test_the_serial_executor_takes_such_networks_and_scores_them():
    model, calibration = randomise_batchnorm(Viewing()), CalibrationSet(IMAGES, LABELS, 4)
    graph, macs = PruningGraph(model, IMAGES), count_macs(model, IMAGES)
    config = LaaspConfig(flops_reduction=0.5, criteria=("l1",), step=0.1)
    tasks = tasks_of(propose(model, graph, macs, measure_baseline(graph, macs, config), config))
    search = SearchConfig(batch_size=4, reestimate_batchnorm=True, racing="off")
    executor = InProcessExecutor(model, calibration, torch.device("cpu"), search, 0)
    network = executor.for_scoring(capture(model, Plan.empty()))
    results = executor.measure(network, tasks, lambda *_: None, lambda share: None)
    assert all(np.isfinite(result.loss) and not result.error for result in results)


def test_an_error_that_is_no_matter_of_format_is_raised():
    class Broken(Viewing):
        def forward(self, x):
            raise RuntimeError("a review of it")  # which has the word in it

    with pytest.raises(RuntimeError, match="a review of it"):
        ready_with(Broken(), CalibrationSet(IMAGES, LABELS, 4))


def test_what_a_network_keeps_is_copied_without_its_history():
    model = Keeping()
    model(IMAGES)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    for made in (deep_copy(model), clone_sharing_parameters(model), rebuild(model, capture(model, Plan.empty()))):
        assert torch.equal(made.last, model.last)
        assert torch.equal(made.maps["all"][0], model.maps["all"][0])
        assert made.last.data_ptr() != model.last.data_ptr()
        assert not made.last.requires_grad
        assert torch.equal(made(IMAGES), model(IMAGES))
    assert model.last.requires_grad


def test_engines_of_networks_that_keep_what_they_computed():
    model, calibration = ready_with(Keeping(), CalibrationSet(IMAGES, LABELS, 3))
    assert Engine(model, calibration).branch_points.untraced == ""
