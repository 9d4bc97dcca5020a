"""The caller's network and random state are as they were, whatever was asked for."""

import copy
import random

import numpy as np
import pytest
import torch
from fakes import Silent
from helpers import small_run
from torch import nn

from laasp_ray import prune
from laasp_ray.cost.latency import measure_pair
from laasp_ray.cost.macs import count_macs
from laasp_ray.models.untouched import in_eval_mode, random_state_kept
from laasp_ray.planning.dry_run import dry_run
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.run.preflight import prepare
from laasp_ray.search import rank


class Careless(nn.Module):
    """Draws from every global generator, counts its calls in a buffer, and keeps its last value."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)
        self.norm = nn.BatchNorm1d(10)
        self.register_buffer("calls", torch.zeros(()))
        self.kept = None

    def forward(self, x):
        self.calls += 1
        random.random(), np.random.rand()
        if self.training:
            x = x + torch.rand(()) * 1e-3
        self.kept = self.norm(self.fc(self.b(self.a(x).relu()).relu().mean(dim=(2, 3))))
        return self.kept


def everything(model):
    return {
        "modes": [module.training for module in model.modules()],
        "wanted": [parameter.requires_grad for parameter in model.parameters()],
        "tensors": copy.deepcopy(model.state_dict()),
        "kept": model.kept,
        "random": (random.getstate(), torch.get_rng_state(), np.random.get_state()),
    }


def assert_as_it_was(model, before):
    now = everything(model)
    assert (now["modes"], now["wanted"], now["kept"]) == (before["modes"], before["wanted"], before["kept"])
    for name, tensor in before["tensors"].items():
        assert torch.equal(now["tensors"][name], tensor), name
    assert now["random"][0] == before["random"][0]
    assert torch.equal(now["random"][1], before["random"][1])
    assert all(np.array_equal(a, b) for a, b in zip(now["random"][2], before["random"][2], strict=True))


def frozen_careless():
    model = Careless().train()
    model.norm.eval()  # a frozen BatchNorm in a network in training mode
    model.a.requires_grad_(False)
    return model


def test_preflight_leaves_network_and_random_state_alone(tmp_path):
    model = frozen_careless()
    before = everything(model)
    config = small_run(tmp_path, prune__flops_reduction=0.1, prune__criteria=["l1", "pls"])
    prepare(config, model)
    assert_as_it_was(model, before)
    prepare(small_run(tmp_path, prune__latency_reduction=0.1, prune__flops_reduction=0.1), model)
    assert_as_it_was(model, before)


def test_modes_and_generators_are_put_back_after_an_error_too():
    model = frozen_careless()
    before = everything(model)
    with pytest.raises(ZeroDivisionError), random_state_kept(), in_eval_mode(model):
        assert not any(module.training for module in model.modules())
        torch.rand(1), np.random.rand(), random.random()
        1 / 0  # noqa: B018
    assert_as_it_was(model, before)


def test_a_whole_run_leaves_network_and_random_state_alone(tmp_path):
    model = frozen_careless()
    before = everything(model)
    config = small_run(
        tmp_path, prune__flops_reduction=0.05, train__epochs=1, train__prune_epoch=0, train__drop_epochs=[]
    )
    result = prune(config, model, distributed=False, progress=Silent())
    assert_as_it_was(model, before)
    assert result.model.a.out_channels + result.model.b.out_channels < 16
    prune(config, model, distributed=False, progress=Silent())  # which only loads it
    assert_as_it_was(model, before)


def test_rank_leaves_network_and_random_state_alone():
    model = frozen_careless()
    before = everything(model)
    rank(model, torch.zeros(10, 3, 16, 16), torch.arange(10), criteria=["l1"], racing=True)
    assert_as_it_was(model, before)


def builder_that_draws():
    return frozen_careless()


def test_a_dry_run_leaves_the_random_state_alone(tmp_path):
    model = frozen_careless()  # only its random state is looked at
    before = everything(model)
    dry_run(
        small_run(tmp_path, model__builder=f"{__name__}:builder_that_draws", model__arguments={}), distributed=False
    )
    assert_as_it_was(model, before)


def test_counting_timing_and_tracing_leave_modes_and_flags_alone():
    model = frozen_careless()
    before = everything(model)
    count_macs(model, torch.zeros(1, 3, 16, 16))
    PruningGraph(model, torch.zeros(1, 3, 16, 16))
    now = everything(model)
    assert torch.equal(now["tensors"]["calls"], before["tensors"]["calls"])
    measure_pair(model, model, (3, 16, 16), device="cpu", repeats=2)
    now = everything(model)
    assert (now["modes"], now["wanted"]) == (before["modes"], before["wanted"])
