"""Stages of group sparsity, the rules of every row of Kang's table, and the networks at ImageNet shapes."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import randomise_batchnorm
from torch import nn

from laasp_ray import models
from laasp_ray.cli import flags
from laasp_ray.config import GroupSparsityConfig, ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.errors import ConfigError
from laasp_ray.methods.group_sparsity import GroupSparsity, layer_rules
from laasp_ray.pruning.network import capture, rebuild
from laasp_ray.pruning.plan import Plan
from laasp_ray.pruning.sparsity.groups import GroupRule, group_counts, satisfies, unpack_mask
from laasp_ray.recipes import recipe, with_sparsity

BUILDERS = {
    "alexnet_grouped_aap": "zoo.alexnet_grouped",
    "alexnet_aap": "torchvision.alexnet",
    "vgg16_aap": "torchvision.vgg16",
    "resnet50_aap": "torchvision.resnet50",
    "resnet152_aap": "torchvision.resnet152",
    "squeezenet1_0_aap": "torchvision.squeezenet1_0",
    "mobilenet_v1_aap": "zoo.mobilenet_v1",
}
G8, G16, THREE_FC, ONE_FC = (
    ["--group", "8", "--prune", "6"],
    ["--group", "16", "--prune", "12"],
    ["--fc-prune", "15,15,12"],
    ["--fc-prune", "12"],
)
ROWS = [
    *itertools.product(["alexnet_grouped_aap", "alexnet_aap", "vgg16_aap"], [G8, G16, [*G16, *THREE_FC]]),
    *itertools.product(["resnet50_aap", "resnet152_aap"], [G8, G16, [*G16, *ONE_FC]]),
    *itertools.product(["squeezenet1_0_aap", "mobilenet_v1_aap"], [G16, ["--group", "16", "--prune", "10"]]),
]
# Convolutions and linear layers that stay dense: everywhere the first convolution, which reads three channels.
DENSE_CONVOLUTIONS = {"mobilenet_v1_aap": 1 + 13}
CONVOLUTIONS = {
    "alexnet_grouped_aap": 5,
    "alexnet_aap": 5,
    "vgg16_aap": 13,
    "resnet50_aap": 53,
    "resnet152_aap": 155,
    "squeezenet1_0_aap": 26,
    "mobilenet_v1_aap": 27,
}


def config_of(name, *given):
    parser = flags.run_parser("sparsify.py", "", flags.SPARSITY_FLAGS)
    return flags.overridden(with_sparsity(recipe(name)), parser.parse_args(list(given)))


def build(name, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        return models.build(recipe(name).model)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 12, 1), nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 2))


def stages_of(model, config):
    method = GroupSparsity()
    context = SimpleNamespace(model=model, config=config, network=capture(model, Plan.empty()), masks={}, iteration=0)
    for _ in config.all_stages:
        context.iteration += 1
        stage = method.iterate(context)
        yield stage
        context.network, context.masks = stage.network, stage.masks


def test_stages_rise_and_keep_what_was_pruned():
    model = small()
    config = GroupSparsityConfig(group=8, pruned_per_group=6, stages=(2, 4, 6), fc_pruned_per_group=(4,))
    stages = list(stages_of(model, config))
    # The first linear layer reads 12 inputs: groups of 8 and 4. Four of six are pruned in proportion: 4 x 2 // 6 = 1.
    assert [stage.details["prune"] for stage in stages] == [
        {"1": 2, "3": 1, "4": 1},
        {"1": 4, "3": 2, "4": 2},
        {"1": 6, "3": 4, "4": 4},
    ]
    counts = [
        {name: group_counts(stage.network.tensors[name] != 0, 8)[0].tolist() for name in stage.masks}
        for stage in stages
    ]
    assert counts == [
        {"1.weight": [6, 6], "3.weight": [7, 4], "4.weight": [7]},
        {"1.weight": [4, 4], "3.weight": [6, 3], "4.weight": [6]},
        {"1.weight": [2, 2], "3.weight": [4, 2], "4.weight": [4]},
    ]
    for before, after in itertools.pairwise(stages):
        for name in before.masks:
            shape = after.network.tensors[name].shape
            assert (unpack_mask(before.masks[name], shape) | ~unpack_mask(after.masks[name], shape)).all()
    assert torch.equal(stages[-1].network.tensors["0.weight"], model[0].weight)


def test_a_linear_layer_of_which_nothing_goes_yet_has_neither_rule_nor_reason():
    config = GroupSparsityConfig(group=8, pruned_per_group=6, stages=(1, 6), fc_pruned_per_group=(4, 6))
    layers = layer_rules(small(), config, 1)
    assert {name: rule.pruned_per_group for name, rule in layers.rules.items()} == {"1": 1, "4": 1}
    assert layers.dense == {"0": "3 inputs a filter, fewer than the group of 8"}


def test_linear_layers_stay_dense_unless_asked_for():
    layers = layer_rules(small(), GroupSparsityConfig(), 6)
    assert layers.rules == {"1": GroupRule(8, 6)}
    assert list(layers.dense) == ["0", "3", "4"]
    assert layers.dense["3"] == "linear, and prune.fc_pruned_per_group is not given"


def test_numbers_for_another_count_of_linear_layers_are_refused():
    with pytest.raises(ConfigError, match=r"per_group is \(1, 2, 3\), the network has 2 linear layers .*\(3, 4\)"):
        layer_rules(small(), GroupSparsityConfig(fc_pruned_per_group=(1, 2, 3)), 6)
    with pytest.raises(ConfigError, match="the network has 0 linear layers"):
        layer_rules(small()[:2], GroupSparsityConfig(fc_pruned_per_group=(1,)), 6)


def test_a_module_that_is_not_there_cannot_be_ignored():
    assert "1" in layer_rules(small(), GroupSparsityConfig(fc_pruned_per_group=(4,), ignored=("1",)), 6).dense
    with pytest.raises(ConfigError, match=r"prune\.ignored names '7\.', which is no module of the network"):
        layer_rules(small(), GroupSparsityConfig(ignored=("7.",)), 6)


def test_a_network_in_which_nothing_can_be_sparse_is_refused():
    with pytest.raises(ConfigError, match=r"no layer .* groups of 8 \(0: 3 inputs a filter"):
        layer_rules(small()[:1], GroupSparsityConfig(), 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 1, "pruned_per_group": 1}, r"prune\.group is 1"),
        (
            {"group": 8, "pruned_per_group": 8},
            r"pruned_per_group is 8, must be from 1 to below prune\.group \(8\)",
        ),
        ({"fc_pruned_per_group": (4, 8)}, r"prune\.fc_pruned_per_group is \(4, 8\)"),
        ({"stages": (2, 2, 6)}, r"prune\.stages is \(2, 2, 6\), must be rising"),
        (
            {"stages": (2, 4)},
            r"is \(2, 4\), must be rising from at least 1 to prune\.pruned_per_group \(6\)",
        ),
        ({"stages": (0, 6)}, r"prune\.stages is \(0, 6\)"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        GroupSparsityConfig(**changes)


def identified(value):
    return value if isinstance(value, str) else "".join(value)


@pytest.mark.parametrize(("name", "flags"), ROWS, ids=identified)
def test_every_row_of_the_table_is_reached_by_flags(name, flags):
    config = config_of(name, *flags)
    assert config.model.builder == BUILDERS[name]
    layers = layer_rules(build(name, "meta"), config.prune, config.prune.pruned_per_group)
    group, prune = int(flags[1]), int(flags[3])
    linear = [prune for layer, (_, prune) in _pairs(layers) if "classifier" in layer or layer == "fc"]
    convolutions = [pair for layer, pair in _pairs(layers) if "classifier" not in layer and layer != "fc"]
    if name == "squeezenet1_0_aap":  # its classifier is a convolution
        linear, convolutions = [], [pair for _, pair in _pairs(layers)]
    assert convolutions == [(group, prune)] * (CONVOLUTIONS[name] - DENSE_CONVOLUTIONS.get(name, 1))
    assert linear == ([int(number) for number in flags[5].split(",")] if "--fc-prune" in flags else [])


def _pairs(layers):
    return [(layer, (rule.group, rule.pruned_per_group)) for layer, rule in layers.rules.items()]


QUICK = [
    *(row for row in ROWS if row[0] in ("squeezenet1_0_aap", "mobilenet_v1_aap")),
    ("alexnet_grouped_aap", G8),
    ("alexnet_aap", G16),
    ("resnet50_aap", [*G16, *ONE_FC]),
]
"""Of the rows that take seconds, one for each make of network."""


@functools.lru_cache(maxsize=1)
def built(name):
    return randomise_batchnorm(build(name)).eval()


@pytest.mark.parametrize(
    ("name", "flags"),
    [pytest.param(*row, marks=() if row in QUICK else pytest.mark.exhaustive) for row in ROWS],
    ids=identified,
)
def test_the_networks_of_every_row_are_made_sparse_and_run(name, flags):
    model, config = built(name), config_of(name, *flags).prune
    (stage,) = stages_of(model, config)
    for layer, pruned in stage.details["prune"].items():
        weight = stage.network.tensors[f"{layer}.weight"]
        # Every number of inputs here is a multiple of 16: no group is short, and each keeps the same number.
        assert weight.shape[1] % 16 == 0
        assert (group_counts(weight != 0, config.group) == config.group - pruned).all(), layer
        assert satisfies(weight, GroupRule(4, 2)) or config.group > 8
    for layer in stage.details["dense"]:
        assert torch.equal(stage.network.tensors[f"{layer}.weight"], model.get_submodule(layer).weight)
    sparse = rebuild(model, stage.network)
    images = torch.randn(1, *recipe(name).model.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs = sparse(images)
        assert outputs.shape == (1, 1000) and outputs.isfinite().all()
        assert not torch.equal(outputs, model(images))


@pytest.mark.parametrize(
    ("builder", "macs", "parameters"),
    [
        # Convolutions 105,415,200 + 223,948,800 + 149,520,384 + 112,140,288 + 74,760,192, linear 58,621,952.
        ("zoo.alexnet_grouped", 724_406_816, 60_965_224),
        # Howard et al. print 569 million and 4.2 million.
        ("zoo.mobilenet_v1", 568_740_352, 4_231_976),
    ],
)
def test_the_networks_of_our_own_are_those_of_their_papers(builder, macs, parameters):
    model = models.build(ModelConfig(builder=builder))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert count_macs(model, torch.zeros(1, 3, 224, 224)).total == macs
    assert models.build(ModelConfig(builder=builder, arguments={"num_classes": 7}))(
        torch.zeros(2, 3, 224, 224)
    ).shape == (2, 7)
