"""Networks over volumes and sequences: counted, timed, and put on a device as those over images are."""

import pytest
import torch
from plain_losses import mean_loss
from torch import nn

from laasp_ray.cost.latency import measure_pair
from laasp_ray.cost.macs import count_macs
from laasp_ray.models.format import in_format_of, to_channels_last, to_fast_format
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.search.evaluate import CalibrationSet, ready
from laasp_ray.train.trainer import rebuild_on

CPU = torch.device("cpu")


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.flat, self.fc = nn.Conv3d(2, 4, 3), nn.Conv2d(4, 5, 2), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.flat(self.conv(x).mean(dim=2)).mean(dim=(2, 3)))


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gru, self.fc = nn.Conv1d(2, 4, 3), nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.gru(self.conv(x).transpose(1, 2))[0][:, -1])


NETWORKS = {"volumes": (Volumes, (2, 5, 6, 7)), "sequences": (Sequences, (2, 9))}
# 4 filters of 2 x 27 weights at 3 x 4 x 5 places, 5 of 4 x 4 at 3 x 4, and 5 x 3; 4 of 2 x 3 at 7 places, and 6 x 3.
MACS = {
    "volumes": {"conv": 4 * 54 * 60, "flat": 5 * 16 * 12, "fc": 15},
    "sequences": {"conv": 4 * 6 * 7, "fc": 18},
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_multiply_accumulates_and_latency(kind):
    build, shape = NETWORKS[kind]
    model = build().train()
    assert count_macs(model, torch.zeros(2, *shape)).per_layer == MACS[kind]
    latency, _ = measure_pair(model, model, shape, device="cpu", batch_size=2, repeats=2, warmup=0)
    assert latency.median_ms > 0
    assert model.training


@pytest.mark.parametrize("kind", NETWORKS)
def test_only_images_tensors_go_channels_last(kind):
    build, shape = NETWORKS[kind]
    model = build()
    images, labels = torch.rand(4, *shape), torch.tensor([0, 1, 2, 0])
    calibration = CalibrationSet(images, labels, 2)
    wanted = mean_loss(model, calibration)
    assert mean_loss(ready(model, CPU), calibration) == pytest.approx(wanted, rel=1e-5)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)
        else:
            assert parameter.is_contiguous()


class Viewing(nn.Module):
    """Its view does not go with a convolution's output that is channels last."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 2)

    def forward(self, x):
        x = self.conv(x)
        return self.head(x.view(x.size(0), -1))


def test_a_network_that_views_its_maps_stays_contiguous_and_its_images_follow():
    images = torch.randn(2, 3, 8, 8)
    model = to_fast_format(Viewing(), images[:1])
    assert model.conv.weight.is_contiguous() and in_format_of(model, images) is images
    assert model(in_format_of(model, images)).shape == (2, 2)
    plain = to_fast_format(nn.Conv2d(3, 4, 3), images[:1])
    assert plain.weight.is_contiguous(memory_format=torch.channels_last)
    assert in_format_of(plain, images).is_contiguous(memory_format=torch.channels_last)


def test_channels_last_keeps_parameters_and_gives_the_network_back():
    model = nn.Conv2d(3, 4, 3)
    weight, values = model.weight, model.weight.detach().clone()
    assert to_channels_last(model) is model and model.weight is weight and torch.equal(model.weight, values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_network_with_volumes_is_put_on_a_gpu():
    model = Volumes()
    rebuilt = rebuild_on(torch.device("cuda"), model, capture(model, Plan.empty()), (3, 8, 8))
    assert rebuilt(torch.zeros(1, 2, 5, 6, 7, device="cuda")).shape == (1, 3)
