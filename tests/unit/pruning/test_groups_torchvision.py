"""Every convolution of torchvision's networks: a spread of layers, by default of one network a family, of the others
and of all layers under the marker `exhaustive`."""

import functools
import json

import pytest
import torch
from pruning_reference import prune_by_iterations, pruned_copy, randomise, some_filters, with_zeroed_producers
from torch import nn

from laasp_ray.config import ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.models import build
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.plan import Plan, macs_after

CONVOLUTIONS = {
    "resnet18": 20,
    "resnet50": 53,
    "mobilenet_v2": 52,
    "vgg11_bn": 8,
    "vgg16_bn": 13,
    "densenet121": 120,
    "efficientnet_b0": 81,
    "convnext_tiny": 22,
    "regnet_y_400mf": 85,
    "resnext50_32x4d": 53,
}
BLOCKS = {"resnext50_32x4d": {1, 32}, "regnet_y_400mf": {1, 6, 13, 26, 55}}
OTHERS_OF_A_FAMILY = {"resnet50", "efficientnet_b0", "resnext50_32x4d", "vgg11_bn", "vgg16_bn"}
"""Of the families of resnet18, mobilenet_v2, regnet_y_400mf, and of the recipes' vgg16_cifar10."""
EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@functools.lru_cache(maxsize=1)
def prepared(name):
    torch.manual_seed(0)
    model = randomise(build(ModelConfig(builder=f"torchvision.{name}", arguments={"num_classes": 10})), EXAMPLE)
    with torch.no_grad():
        return model, PruningGraph(model, EXAMPLE), count_macs(model, EXAMPLE)


@pytest.fixture
def affine_only(monkeypatch):
    """LayerNorm without the normalising: then a removed channel does the same as one of zeros, in ConvNeXt too."""

    def scale_and_shift(x, normalized_shape, weight=None, bias=None, eps=1e-5):
        assert x.shape[-1] == normalized_shape[0] == weight.shape[0]
        return x * weight + bias

    monkeypatch.setattr(torch.nn.functional, "layer_norm", scale_and_shift)


def check_layer(name, layer):
    """Prunes a third of a layer's filters: shapes, outputs against zeroed channels, MACs against a new count."""
    model, graph, macs = prepared(name)
    filters = some_filters(graph.layers[layer])
    plan = graph.step(layer, filters)
    pruned = pruned_copy(model, plan)
    assert pruned.get_submodule(layer).out_channels == graph.layers[layer].filters - len(filters)
    assert plan.layers[layer] == tuple(sorted(set(range(graph.layers[layer].filters)) - set(filters)))
    with torch.no_grad():
        found, wanted, full = pruned(EXAMPLE), with_zeroed_producers(model, plan)(EXAMPLE), model(EXAMPLE)
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() <= 1e-5 * scale, f"{layer}: {(found - wanted).abs().max() / scale}"
    assert not torch.equal(found, full), f"{layer}: the prune changed nothing"
    assert macs_after(macs, plan) == count_macs(pruned, EXAMPLE).total, layer


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.exhaustive if name in OTHERS_OF_A_FAMILY else ()) for name in CONVOLUTIONS],
)
def test_a_spread_of_layers(name, affine_only):
    model, graph, _ = prepared(name)
    assert graph.skipped == {}
    assert list(graph.layers) == [layer for layer, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert len(graph.layers) == CONVOLUTIONS[name]
    assert {group.blocks for group in graph.layers.values()} == BLOCKS.get(name, {1})
    layers = list(graph.layers)
    for position in {0, len(layers) // 2, len(layers) - 1}:
        check_layer(name, layers[position])


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_layer(name, affine_only):
    for layer in prepared(name)[1].layers:
        check_layer(name, layer)


@pytest.mark.parametrize(
    ("builder", "layers"),
    [
        ("cifar.resnet20", ["conv1", "layer2.0.conv1", "layer2.0.downsample.0", "layer3.2.conv2"]),
        pytest.param(
            "torchvision.mobilenet_v2",
            ["features.1.conv.0.0", "features.3.conv.1.0", "features.18.0", "features.4.conv.2"],
            marks=pytest.mark.exhaustive,
        ),
        ("torchvision.regnet_y_400mf", ["trunk_output.block1.block1-0.f.b.0", "stem.0"]),
        pytest.param(
            "torchvision.regnet_y_400mf",
            [
                "trunk_output.block1.block1-0.f.b.0",
                "trunk_output.block2.block2-0.f.a.0",
                "stem.0",
                "trunk_output.block1.block1-0.f.se.fc1",
            ],
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "torchvision.convnext_tiny", ["features.0.0", "features.3.0.block.0"], marks=pytest.mark.exhaustive
        ),
    ],
)
def test_steps_replayed_on_a_fresh_network(builder, layers):
    torch.manual_seed(0)
    model = randomise(build(ModelConfig(builder=builder)), EXAMPLE)
    fresh, macs = pruned_copy(model, Plan()), count_macs(model, EXAMPLE)
    plan = prune_by_iterations(model, EXAMPLE, layers, len(layers) + 1)
    replayed = pruned_copy(fresh, Plan.from_json(json.loads(json.dumps(plan.to_json()))))
    assert replayed.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in replayed.state_dict().items())
    with torch.no_grad():
        assert torch.equal(replayed(EXAMPLE), model(EXAMPLE))
    assert macs_after(macs, plan) == count_macs(model, EXAMPLE).total < macs.total


def test_grouped_convolutions_down_to_depthwise_and_on():
    """ResNeXt's bottleneck in small: pruned until each group has one input and one filter, then group by group."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    fresh, plan = pruned_copy(model, Plan()), Plan()
    for layer, filters in (("0", [1, 3, 8, 9]), ("2", [0, 3, 5, 6]), ("0", [1, 2, 5, 6]), ("0", [2]), ("2", [0])):
        step = PruningGraph(model, EXAMPLE).step(layer, filters)
        before = pruned_copy(model, Plan())
        reference = with_zeroed_producers(before, step)
        for tensor in pruned_copy(model, step).parameters():
            assert tensor.numel()
        expected = reference(EXAMPLE)
        model = pruned_copy(model, step)
        torch.testing.assert_close(model(EXAMPLE), expected)
        plan = plan.then(step)
    assert (model[2].groups, tuple(model[2].weight.shape)) == (2, (2, 1, 3, 3))
    # first step leaves 0 2 | 4 5 | 6 7 | 10 11, the third 0 | 5 | 6 | 11, the last two take 6 and 0
    assert plan.layers == {"0": (5, 11), "2": (2, 7)}
    assert plan.tensors["2.weight"] == {0: ((2, 7),), 1: ((2,), (2,))}
    replayed = pruned_copy(fresh, plan)
    assert all(torch.equal(a, b) for a, b in zip(replayed.parameters(), model.parameters(), strict=True))
