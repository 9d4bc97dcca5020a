"""FLOPs reductions that the LAASP authors' logs print after their first prune, and their step sizes."""

import functools

import pytest
import torch

from laasp_ray.config import ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.models import build
from laasp_ray.pruning.graph import PruningGraph, step_sizes
from laasp_ray.pruning.plan import macs_after

EXAMPLE = torch.zeros(1, 3, 32, 32)


@functools.cache
def network(name):
    model = build(ModelConfig(builder=name, input_shape=(3, 32, 32)))
    return PruningGraph(model, EXAMPLE), count_macs(model, EXAMPLE)


@pytest.mark.parametrize(
    ("name", "layer", "printed"),
    [
        ("cifar.resnet20", "layer1.0.conv1", "0.007226"),
        ("cifar.resnet20", "layer1.1.conv1", "0.007226"),
        ("cifar.resnet32", "layer2.0.downsample.0", "0.010251"),
        ("cifar.resnet56", "layer2.7.conv2", "0.010326"),
    ],
)
def test_reduction_after_the_first_prune_of_one_filter(name, layer, printed):
    graph, macs = network(name)
    assert step_sizes(graph, macs, step=0.01, step_rule="flops_share")[layer] == 1
    for index in (0, graph.layers[layer].filters - 1):
        assert f"{1 - macs_after(macs, graph.step(layer, [index])) / macs.total:.6f}" == printed


def test_step_sizes_of_resnet56():
    graph, macs = network("cifar.resnet56")
    sizes = step_sizes(graph, macs, step=0.01, step_rule="flops_share")
    inner = {f"layer{stage}.{block}.conv1": size for stage, size in ((1, 4), (2, 9), (3, 17)) for block in range(9)}
    inner |= {"layer2.0.conv1": 11, "layer3.0.conv1": 23}
    outer = {"conv1": 1} | {
        f"layer{stage}.{block}.conv2": size for stage, size in ((1, 1), (2, 1), (3, 2)) for block in range(9)
    }
    outer |= {"layer2.0.downsample.0": 1, "layer3.0.downsample.0": 2}
    assert sizes == inner | outer


@pytest.mark.parametrize(
    ("layer", "percent"),
    [
        ("conv1", 2.198),
        ("layer2.0.downsample.0", 1.033),
        ("layer3.8.conv2", 0.500),
    ],
)
def test_share_of_one_filter_of_a_residual_group_of_resnet56(layer, percent):
    graph, macs = network("cifar.resnet56")
    assert round(100 * (1 - macs_after(macs, graph.step(layer, [0])) / macs.total), 3) == percent
