"""A step of training is tried before a run, whole and cut, and leaves everything as it was."""

import copy

import pytest
import torch
from helpers import small_run
from torch import nn

from laasp_ray import models
from laasp_ray.config import ModelConfig
from laasp_ray.errors import ConfigError
from laasp_ray.planning.dry_run import dry_run
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.run.preflight import prepare
from laasp_ray.train import check
from laasp_ray.train.check import check_training, small_plan
from laasp_ray.train.trial import try_step

SHAPE = (3, 16, 16)


class Net(nn.Module):
    """Two convolutions and a head; `head` is what training runs in place of it, on the pooled features."""

    def __init__(self, head=None):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 10)
        self.head = head

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu().mean(dim=(2, 3))
        return self.head(x) if self.training and self.head is not None else self.fc(x)


class Aux(Net):
    def forward(self, x):
        out = super().forward(x)
        return (out, out) if self.training else out


class OnlyOnePixel(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm2d(8, affine=True)

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu().mean(dim=(2, 3), keepdim=True)
        return self.fc((self.norm(x) if self.training else x).flatten(1))


class Detached(Net):
    def forward(self, x):
        return super().forward(x).detach() if self.training else super().forward(x)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Aux(), r"cannot be trained: in training mode it gives a tuple, .*aux_logits=False"),
        (OnlyOnePixel(), r"cannot be trained: module norm fails in training mode \(ValueError: Expected more than 1"),
        (Detached(), r"cannot be trained: its outputs in training mode have no gradient"),
        (Net(nn.Linear(9, 10)), r"cannot be trained: module head fails in training mode \(RuntimeError: .*mat1"),
        (Net().requires_grad_(False), r"cannot be trained: no parameter of the network requires a gradient"),
        # b feeds the head of training, which the trace of eval mode does not see.
        (Net(nn.Linear(8, 10)), r"once layers are pruned \(b\): module head fails in training mode .*prune\.ignored"),
    ],
    ids=["tuple", "one pixel", "detached", "another size", "frozen", "only in training"],
)
def test_what_training_would_die_of_is_said_before(tmp_path, model, sentence):
    config = small_run(tmp_path, prune__flops_reduction=0.1)
    with pytest.raises(ConfigError, match=sentence):
        prepare(config, model)


def test_the_remedy_for_a_head_of_training_works(tmp_path):
    prepared = prepare(small_run(tmp_path, prune__flops_reduction=0.05, prune__ignored=["b"]), Net(nn.Linear(8, 10)))
    assert "is ignored" in prepared.baseline.skipped["b"]


@pytest.mark.parametrize("prunes", [True, False])
def test_the_dry_run_tries_it_too(tmp_path, prunes):
    config = small_run(
        tmp_path,
        model__builder=f"{__name__}:Aux",
        model__arguments={},
        **({} if prunes else {"prune__flops_reduction": 0.0}),
    )
    with pytest.raises(ConfigError, match="in training mode it gives a tuple"):
        dry_run(config, distributed=False)


def test_auxiliary_outputs_of_torchvision_and_the_remedy(tmp_path):
    arguments = {"num_classes": 10, "init_weights": False}
    config = small_run(tmp_path)
    whole = models.build(ModelConfig(builder="torchvision.googlenet", arguments=arguments))
    with pytest.raises(ConfigError, match=r"GoogLeNetOutputs \(logits, aux_logits2, aux_logits1\), .*aux_logits=False"):
        check_training(whole, (3, 64, 64), config.train, None)
    without = models.build(ModelConfig(builder="torchvision.googlenet", arguments=arguments | {"aux_logits": False}))
    check_training(without, (3, 64, 64), config.train, None)


def test_grey_images_are_loaded_with_three_channels(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    with pytest.raises(ConfigError, match=r"input_shape is \(1, 16, 16\), but .* 3 channels.* to \(3, 16, 16\)"):
        prepare(small_run(tmp_path, model__input_shape=[1, 16, 16]), model)


def test_the_small_plan_takes_a_filter_of_every_layer_and_of_every_block():
    grouped = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    graph = PruningGraph(grouped, torch.zeros(1, *SHAPE))
    assert small_plan(graph, list(graph.layers)).layers == {"0": (1, 2, 3, 5, 6, 7), "1": (1, 2, 3, 5, 6, 7)}


def test_parameters_without_a_gradient_are_told(tmp_path):
    model, config = Net(nn.Linear(8, 10)), small_run(tmp_path).train
    assert try_step(copy.deepcopy(model), SHAPE, config).unused == ["fc.weight", "fc.bias"]
    model.a.requires_grad_(False)  # asks for none
    assert try_step(copy.deepcopy(model), SHAPE, config).unused == ["fc.weight", "fc.bias"]
    assert try_step(Net(), SHAPE, config).unused == []


def test_layers_that_cannot_be_cut_together_are_no_fault_of_training(tmp_path, monkeypatch):
    def impossible(model, plan):
        raise check.PruningError("not together")

    monkeypatch.setattr(check, "apply_plan", impossible)
    graph = PruningGraph(Net(), torch.zeros(1, *SHAPE))
    check_training(Net(), SHAPE, small_run(tmp_path).train, graph)
