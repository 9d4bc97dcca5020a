"""The convolutions of a graph against the plan, by hand."""

import pytest
import torch
from torch import nn

from laasp_ray.errors import ExportError
from laasp_ray.export.graph import (
    GraphConvolution,
    called_convolutions,
    check_convolutions,
    convolutions_of_program,
    planned_convolutions,
)
from laasp_ray.pruning.plan import Plan


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.never = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.up(self.depthwise(self.depthwise(self.wide(x))))


KEPT = (0, 2, 5)
PLAN = Plan(
    tensors={"wide.weight": {0: (KEPT,)}, "depthwise.weight": {0: (KEPT,)}, "up.weight": {0: (KEPT,)}},
    attributes={"depthwise": {"in_channels": 3, "out_channels": 3, "groups": 3}},
    biases=("wide",),
)
PLANNED = {
    "wide.weight": GraphConvolution("wide.weight", (3, 3, 3, 3), 1),
    "depthwise.weight": GraphConvolution("depthwise.weight", (3, 1, 3, 3), 3),
    "up.weight": GraphConvolution("up.weight", (3, 4, 2, 2), 1),
    "never.weight": GraphConvolution("never.weight", (4, 4, 1, 1), 1),
}
CALLED = ["wide.weight", "depthwise.weight", "depthwise.weight", "up.weight"]


def test_what_is_planned_follows_from_the_unpruned_network_and_the_plan():
    assert planned_convolutions(Network(), PLAN) == PLANNED


def test_called_are_those_of_a_forward_pass_each_time():
    network = Network()
    assert called_convolutions(network, torch.zeros(1, 3, 9, 9)) == CALLED
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_program_of_torch_export():
    program = torch.export.export(Network().eval(), (torch.zeros(2, 3, 9, 9),))
    found = convolutions_of_program(program)
    assert [(one.weight, one.shape, one.groups) for one in found] == [
        ("wide.weight", (8, 3, 3, 3), 1),
        ("depthwise.weight", (8, 1, 3, 3), 8),
        ("depthwise.weight", (8, 1, 3, 3), 8),
        ("up.weight", (8, 4, 2, 2), 1),
    ]
    assert check_convolutions(found, planned_convolutions(Network(), Plan.empty()), CALLED) == 4
    with pytest.raises(
        ExportError, match=r"wide\.weight \(8, 3, 3, 3\) in 1 groups, planned wide\.weight \(3, 3, 3, 3\)"
    ):
        check_convolutions(found, PLANNED, CALLED)


def test_a_weight_without_its_name_is_known_by_its_shape():
    found = [PLANNED[weight] for weight in CALLED]
    assert check_convolutions(found, PLANNED, CALLED) == 4
    found[1] = GraphConvolution("val_7", (3, 1, 3, 3), 3)
    assert check_convolutions(found, PLANNED, CALLED) == 4
    for other in (((3, 1, 3, 3), 1), ((4, 1, 3, 3), 3)):
        found[1] = GraphConvolution("val_7", *other)
        with pytest.raises(ExportError, match=r"depthwise\.weight .* is not in the graph"):
            check_convolutions(found, PLANNED, CALLED)


def test_a_convolution_that_is_missing_is_named():
    with pytest.raises(
        ExportError, match=r"not as planned: up\.weight \(3, 4, 2, 2\) in 1 groups is not in the graph$"
    ):
        check_convolutions([PLANNED[weight] for weight in CALLED[:3]], PLANNED, CALLED)
