"""Whole networks, pruned in every layer that can be, as ONNX and as a program of torch.export: their channels are as
planned, their outputs are torch's. The large ones are `exhaustive`; they print the largest difference."""

import copy

import pytest
import torch
from helpers import randomise_batchnorm

from laasp_ray import models
from laasp_ray.config import ModelConfig
from laasp_ray.export.graph import planned_convolutions
from laasp_ray.export.network import export_network
from laasp_ray.pruning.graph import PruningGraph, _at_limits
from laasp_ray.pruning.plan import apply_plan

SHAPE = (3, 32, 32)
NETWORKS = {  # builder -> its convolutions
    "cifar.resnet20": 21,
    "cifar.resnet56": 57,
    "torchvision.resnet50": 53,
    "torchvision.mobilenet_v2": 52,
    "torchvision.convnext_tiny": 22,
}


def each(format):
    for builder in NETWORKS:
        small = builder == "cifar.resnet20"
        yield pytest.param(builder, format, id=f"{builder}-{format}", marks=() if small else pytest.mark.exhaustive)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("builder", "format"), [*each("onnx"), *each("torch")])
def test_a_pruned_network_is_exported_as_planned(builder, format):
    torch.manual_seed(0)
    arguments = {"num_classes": 10}
    unpruned = models.build(ModelConfig(builder=builder, arguments=arguments, input_shape=SHAPE))
    randomise_batchnorm(unpruned)
    plan = _at_limits(PruningGraph(unpruned, torch.zeros(1, *SHAPE)), 0.25, None, 1)
    # Shortcuts of MobileNetV2 and ConvNeXt, too: nearly every layer loses filters.
    assert len(plan.layers) >= 0.9 * NETWORKS[builder]
    network = copy.deepcopy(unpruned)
    apply_plan(network, plan)
    made = export_network(network, SHAPE, planned_convolutions(unpruned, plan), format)
    record = made.record
    print(
        f"\n{builder} {format}: {record.convolutions} convolutions, largest difference {record.max_difference:.2e} at "
        f"outputs up to {record.largest_output:.3g}, {record.bytes:,} bytes, {record.seconds:.1f} s"
    )
    assert record.convolutions == NETWORKS[builder]
    assert record.max_difference <= 1e-4 * record.largest_output
    assert record.largest_output > 0.01
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 4 * parameters < record.bytes < 4 * parameters + 2_000_000
