import pytest
import torch
from torch import nn

from laasp_ray.config import ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.models import build


@pytest.mark.parametrize(
    ("builder", "size", "millions"),
    [
        ("cifar.resnet20", 32, 40.81),
        ("cifar.resnet32", 32, 69.12),
        ("cifar.resnet56", 32, 125.75),
        ("cifar.resnet110", 32, 253.15),
        ("torchvision.resnet18", 224, 1814),
        ("torchvision.resnet34", 224, 3664),
        ("torchvision.resnet50", 224, 4089),
        ("torchvision.mobilenet_v2", 224, 300.77),
    ],
)
def test_published_networks(builder, size, millions):
    model = build(ModelConfig(builder=builder))
    digits = 2 if millions != int(millions) else 0
    assert round(count_macs(model, torch.zeros(1, 3, size, size)).total / 1e6, digits) == millions


def test_by_hand():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.ConvTranspose2d(6, 2, 2, 2),
        nn.Flatten(),
        nn.Linear(2 * 100, 7),
    )
    macs = count_macs(model, torch.zeros(3, 4, 5, 5))
    # 6 filters of 2x3x3 at 25 places; each of 25 inputs of 6 channels makes 2x2x2 outputs; 200 x 7
    assert macs.per_layer == {"0": 6 * 18 * 25, "2": 25 * 6 * 8, "4": 1400}
    assert macs.total == 2700 + 1200 + 1400
    assert macs.weight_shapes == {"0": (6, 2, 3, 3), "2": (6, 2, 2, 2), "4": (7, 200)}
    assert "batch_norm" in macs.uncounted
    assert "conv" not in macs.uncounted
    assert "multiply-accumulates" in macs.convention


def test_a_layer_used_twice_counts_twice_and_an_unused_one_nothing():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(5, 5)

        def forward(self, x):
            return self.used(self.used(x))

    assert count_macs(Twice(), torch.zeros(1, 3)).per_layer == {"used": 18, "unused": 0}


def test_the_model_is_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_macs(model, torch.randn(2, 1, 3, 3))
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
