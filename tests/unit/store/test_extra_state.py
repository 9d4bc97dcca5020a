"""Extra state that is a tensor goes wherever weights go, and is each network's own."""

import torch
from extra_state import Keeping
from torch import nn

from laasp_ray.config import ModelConfig
from laasp_ray.pruning.network import NetworkState, capture, rebuild
from laasp_ray.pruning.plan import Plan
from laasp_ray.store.artifact import load_pruned, save_pruned
from laasp_ray.store.checkpoint import load_checkpoint, save_checkpoint
from laasp_ray.store.storage import Storage
from laasp_ray.train.ema import MovingAverage

STATE = torch.tensor([3.0, 4.0])


def network(state):
    return nn.Sequential(nn.Conv2d(3, 2, 1), Keeping(state.clone()))


def test_through_a_checkpoint_and_a_network_state(tmp_path):
    storage, model = Storage.open(str(tmp_path)), network(STATE)
    save_checkpoint(storage, "1", model=capture(model, Plan.empty()).tensors)
    loaded = load_checkpoint(storage, "1").model
    assert torch.equal(loaded["1._extra_state"], STATE)
    rebuilt = rebuild(network(torch.zeros(2)), NetworkState(Plan.empty(), loaded))
    assert torch.equal(rebuilt[1].state, STATE)
    rebuilt[1].state += 1  # its own, not what was loaded, which may be a view of Ray's object store
    assert torch.equal(loaded["1._extra_state"], STATE)


def test_through_the_artifact_of_whatever_shape_and_type_it_has_become(tmp_path):
    storage = Storage.open(str(tmp_path)).child("pruned")
    model = ModelConfig(builder="tests:network", arguments={}, input_shape=(3, 8, 8))
    save_pruned(storage, model=network(STATE), model_config=model, plan=Plan.empty(), metrics={})
    loaded = load_pruned(tmp_path, network(torch.zeros(5, dtype=torch.int64)))
    assert torch.equal(loaded[1].state, STATE)


def test_a_moving_average_takes_it_as_it_is():
    model = network(STATE)
    average = MovingAverage(model, 0.9)
    model[1].state = torch.arange(5)
    average.update(1)
    assert average.tensors["1._extra_state"].tolist() == [0, 1, 2, 3, 4]
