"""Runs whose prunes are made up for: resumed anywhere they are the same to the last bit, and their weights reload."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import Silent
from torch import nn
from whole_runs import events_of, on_pictures, power_cut

from laasp_ray import load_pruned, prune
from laasp_ray.pruning.plan import Plan
from laasp_ray.run.events import read_event
from laasp_ray.run.state import advance, initial_state
from laasp_ray.search import compensating


class WithoutBias(nn.Module):
    """Convolutions without bias or BatchNorm: compensation gives them a bias."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.second = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.third = nn.Conv2d(12, 12, 3, stride=2, bias=False)
        self.head = nn.Linear(12, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.head(self.third(x).relu().mean((2, 3)))


SETTINGS = {
    "prune__criteria": ["l1", "obs"],
    "prune__compensate": "full",
    "prune__reestimate_batchnorm": True,
    "prune__flops_reduction": 0.14,
    "prune__step": 0.03,
    "prune__fine_tune_every": 0.08,
}


def run(config):
    return prune(config, distributed=False, progress=Silent())


def iterations(config):
    return [event.data for event in events_of(config) if event.name == "iteration"]


def whole(config):
    found = run(config)
    return found, [event.name for event in events_of(config)]


@pytest.fixture(scope="module", autouse=True)
def moments_measured_anew_between_two_trainings():
    """As after eight prunes without training, after two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compensating, "MOST_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory, pictures):
    config = on_pictures(tmp_path_factory.mktemp("reference"), pictures, **SETTINGS)
    return config, *whole(config)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from helpers import write_pictures

    return write_pictures(tmp_path_factory.mktemp("pictures"), side=8, train=8, test=2)


def test_iterations_say_what_compensation_gained_and_keep_their_weights(reference):
    config, _, names = reference
    after = [name for name in names if name in ("iteration", "epoch")]
    assert "iii" in "".join(name[0] for name in after)  # prunes with no training in between, more than MOST_STEPS
    for data in iterations(config):
        details = data["details"]
        assert details["compensated"] is not (details["loss_uncompensated"] < details["loss_compensated"])
        chosen = details["loss_compensated" if details["compensated"] else "loss_uncompensated"]
        assert data["decision"]["loss"] == pytest.approx(chosen, rel=1e-5)  # all 6 images are checked
        assert [file for file in data["digests"] if file.startswith("weights/")] == [
            f"weights/{data['iteration']:06d}.safetensors"
        ]
    assert any(data["details"]["compensated"] for data in iterations(config))
    # Training made those of before it needless.
    assert len(list((Path(config.storage) / config.name / "weights").glob("*"))) <= len(iterations(config))


def test_what_a_race_leaves_is_stored_until_something_is_trained(reference):
    config, _, _ = reference
    state = initial_state(config)
    files = []
    for event in events_of(config):
        state = advance(state, read_event(event, ""), config)
        if event.name == "iteration":
            assert state.race == f"races/{event.data['iteration']:06d}.safetensors"
            assert [file for file in state.digests if file.startswith("races/")] == [state.race]
            files.append(state.race)
        elif event.name == "epoch":
            assert state.race == ""
            assert not any(file.startswith("races/") for file in state.digests)
    assert len(files) > 1
    there = (Path(config.storage) / config.name / "races").glob("*")
    assert {f"races/{path.name}" for path in there} <= {files[-1]}


def test_the_target_is_met_with_no_filter_more_than_it_needs(reference):
    config, result, _ = reference
    *_, before, last = [data["decision"] for data in iterations(config)]
    each = (last["flops_reduction"] - before["flops_reduction"]) / len(last["filters"])
    assert config.prune.flops_reduction <= result.summary["flops_reduction"]
    assert result.summary["flops_reduction"] - each < config.prune.flops_reduction


def test_the_pruned_network_reloads(reference):
    config, result, _ = reference
    folder = Path(config.storage) / config.name
    again = load_pruned(folder)
    ours = again.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in result.model.state_dict().items())
    plan = Plan.from_json(json.loads((folder / "pruned" / "plan.json").read_text()))
    assert plan.biases == ()  # every reader of this network has a bias or a BatchNorm behind it


def test_cut_off_at_every_event_it_ends_the_same(reference, tmp_path, pictures, monkeypatch):
    config, result, names = reference
    again = on_pictures(tmp_path, pictures, **SETTINGS)
    for position in [place for place, name in enumerate(names) if name in ("iteration", "epoch", "finish")]:
        with power_cut(monkeypatch, position):
            run(again)
    found = run(again)
    assert [event.name for event in events_of(again)] == names
    assert [data["decision"] for data in iterations(again)] == [data["decision"] for data in iterations(config)]
    ours = found.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in result.model.state_dict().items())


def test_damaged_weights_of_an_iteration_are_named(reference, tmp_path, pictures, monkeypatch):
    _, _, names = reference
    config = on_pictures(tmp_path, pictures, **SETTINGS)
    first = names.index("iteration")
    with power_cut(monkeypatch, first + 1):
        run(config)
    file = Path(config.storage) / config.name / "weights" / "000001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(Exception, match=r"weights/000001\.safetensors in .* is damaged or was replaced"):
        run(config)


def test_a_prune_that_compensation_makes_worse_is_plain(tmp_path, pictures, monkeypatch):
    from laasp_ray.pruning import moments

    guess = moments._guess

    def wrong(*of_group):
        found = guess(*of_group)
        return dataclasses.replace(found, coefficients=found.coefficients + np.float32(3))

    monkeypatch.setattr(moments, "_guess", wrong)
    config = on_pictures(tmp_path, pictures, **SETTINGS | {"prune__iterations": 1})
    run(config)
    (data,) = iterations(config)
    assert data["details"]["compensated"] is False
    assert data["decision"]["loss"] == pytest.approx(data["details"]["loss_uncompensated"], rel=1e-5)


def test_layers_without_bias_get_one_that_is_trained_cut_and_loaded(tmp_path, pictures, monkeypatch):
    settings = SETTINGS | {"model__builder": f"{__name__}:WithoutBias", "prune__reestimate_batchnorm": False}
    settings |= {"prune__flops_reduction": 0.5, "prune__step": 0.1, "prune__fine_tune_every": 0.2}
    config = on_pictures(tmp_path / "whole", pictures, **settings)
    result, names = whole(config)
    folder = Path(config.storage) / config.name
    plan = Plan.from_json(json.loads((folder / "pruned" / "plan.json").read_text()))
    assert plan.biases and set(plan.biases) <= {"second", "third"}
    assert all(len(plan.tensors[f"{name}.bias"][0][0]) < 12 for name in plan.biases if name in plan.layers)
    again = load_pruned(folder, WithoutBias(3))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in result.model.state_dict().items())
    assert any(bool(result.model.get_submodule(name).bias.abs().max() > 0) for name in plan.biases)
    cut = on_pictures(tmp_path / "cut", pictures, **settings)
    for position in [place for place, name in enumerate(names) if name in ("iteration", "epoch")]:
        with power_cut(monkeypatch, position):
            run(cut)
    found = run(cut).model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in result.model.state_dict().items())
