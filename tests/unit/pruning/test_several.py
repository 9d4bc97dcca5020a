"""Which layers can be pruned side by side, and one plan of several of them."""

import pytest
import torch
from torch import nn

from laasp_ray import models
from laasp_ray.config import ModelConfig
from laasp_ray.errors import PruningError
from laasp_ray.pruning.channels import plan_of
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.joint import independent_layers, joint_removal
from laasp_ray.pruning.plan import Plan, apply_plan

EXAMPLE = torch.zeros(1, 3, 16, 16)


class Separable(nn.Module):
    """A convolution, a depthwise one behind it, and a 1x1; then a shortcut over another 1x1."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pointwise = nn.Conv2d(6, 4, 1)
        self.inner = nn.Conv2d(4, 5, 1)
        self.outer = nn.Conv2d(5, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.pointwise(self.depthwise(self.stem(x)))
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.fc(x.mean((2, 3)))


def test_layers_inside_the_blocks_of_a_residual_network():
    model = models.build(ModelConfig(builder="cifar.resnet20")).eval()
    expected = tuple(f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3))
    assert independent_layers(PruningGraph(model, EXAMPLE)) == expected


def test_a_depthwise_convolution_belongs_to_the_layer_before_it():
    torch.manual_seed(0)
    assert independent_layers(PruningGraph(Separable().eval(), EXAMPLE)) == ("stem", "inner")


def test_one_plan_does_what_one_after_the_other_does():
    torch.manual_seed(0)
    model = models.build(ModelConfig(builder="cifar.resnet20")).eval()
    graph = PruningGraph(model, EXAMPLE)
    chosen = {"layer1.0.conv1": (0, 3), "layer1.1.conv1": (15,), "layer3.2.conv1": tuple(range(1, 64))}
    steps = [graph.step(layer, filters) for layer, filters in chosen.items()]
    joint = plan_of(joint_removal(graph, chosen))
    assert joint == Plan.empty().then(steps[0]).then(steps[1]).then(steps[2])
    apply_plan(model, joint)
    assert model(EXAMPLE).shape == (1, 10)
    assert model.get_submodule("layer3.2.conv1").out_channels == 1
    with pytest.raises(PruningError, match=r"all 16 filters of layer1\.0\.conv1"):
        joint_removal(graph, {"layer1.0.conv1": range(16)})
