"""What is measured of the targets besides FLOPs, after a prune."""

import pytest
import torch
from helpers import small_run
from torch import nn

from laasp_ray.cost.latency import Latency
from laasp_ray.methods import targets
from laasp_ray.methods.targets import Reached, measure_targets
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan, apply_plan


@pytest.fixture
def networks():
    """The unpruned network, with 3*8*9 + 8 + 10*8 + 10 = 314 parameters, and what is left of it without 6 of 8 filters:
    3*2*9 + 2 + 10*2 + 10 = 86."""
    torch.manual_seed(0)
    unpruned = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).train()
    step = PruningGraph(unpruned, torch.zeros(1, 3, 16, 16)).step("0", range(6))
    pruned = torch.nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    apply_plan(pruned, step)
    return unpruned, capture(pruned, Plan.empty().then(step))


def latency(median_ms):
    return Latency(median_ms, (median_ms, median_ms), 4, "cpu", 1, 20)


def test_without_such_targets_nothing_is_measured(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "measure_pair", lambda *given, **settings: pytest.fail("the clock was asked"))
    reached = measure_targets(*networks, small_run(tmp_path))
    assert reached == Reached({})


def test_parameters_are_counted(networks, tmp_path):
    reached = measure_targets(*networks, small_run(tmp_path, prune__parameters_reduction=0.5))
    assert reached == Reached({"parameters": 1 - 86 / 314})


def test_latency_is_the_medians_against_the_unpruned_networks(networks, tmp_path, monkeypatch):
    unpruned, network = networks
    asked = []

    def pair(first, second, shape, **settings):
        asked.append((first, second[0].out_channels, tuple(shape), settings))
        return latency(8.0), latency(6.0)

    monkeypatch.setattr(targets, "measure_pair", pair)
    config = small_run(tmp_path, prune__latency_reduction=0.5, prune__latency_batch=4, prune__parameters_reduction=0.1)
    reached = measure_targets(unpruned, network, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert asked == [(unpruned, 2, (3, 16, 16), {"batch_size": 4, "device": device})]
    assert reached.shares == {"parameters": 1 - 86 / 314, "latency": 0.25}
    assert [each.median_ms for each in reached.latency] == [8.0, 6.0]
    assert reached.latency[1].batch_size == 4


def test_the_clock_measures_and_leaves_the_network_alone(networks, tmp_path):
    unpruned, network = networks
    before = {name: tensor.clone() for name, tensor in unpruned.state_dict().items()}
    reached = measure_targets(unpruned, network, small_run(tmp_path, prune__latency_reduction=0.5))
    first, second = reached.latency
    assert (first.batch_size, first.repeats) == (1, 20) and second.median_ms > 0
    assert reached.shares == {"latency": 1 - second.median_ms / first.median_ms}
    assert unpruned.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in unpruned.state_dict().items())
