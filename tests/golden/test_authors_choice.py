"""The first prune that the LAASP authors' log says, found again on other images."""

import dataclasses

import pytest
from helpers import shared_data

from laasp_ray.config import ModelConfig
from laasp_ray.data.calibration import draw_calibration_images
from laasp_ray.data.loaders.decoding import normalise
from laasp_ray.data.sources.registry import open_source
from laasp_ray.models import build, load_weights
from laasp_ray.recipes import recipe
from laasp_ray.search import rank

CHOICES = [
    ("resnet20_epoch100", "cifar.resnet20", "layer1.0.conv1", "0.007226"),
    ("resnet20_epoch130", "cifar.resnet20", "layer1.1.conv1", "0.007226"),
    ("resnet32_epoch50", "cifar.resnet32", "layer2.0.downsample.0", "0.010251"),
    ("resnet56_epoch60", "cifar.resnet56", "layer2.7.conv2", "0.010326"),
]


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("racing", [True, False])
@pytest.mark.parametrize(("checkpoint", "builder", "layer", "flops_reduction"), CHOICES)
def test_the_first_prune_is_the_one_in_the_log(checkpoint, builder, layer, flops_reduction, racing):
    weights = shared_data(f"checkpoints/{checkpoint}.safetensors")
    data = dataclasses.replace(recipe("resnet20_cifar10").data, path=str(shared_data("cifar10_mini")))
    model = build(ModelConfig(builder=builder, input_shape=(3, 32, 32)))
    load_weights(model, weights)
    calibration = draw_calibration_images(open_source(data, "train"), data, images=4000, seed=0)
    assert len(calibration.labels) == 4000
    best = rank(
        model,
        calibration.images,
        calibration.labels,
        prepare=lambda batch: normalise(batch, data),
        racing=racing,
        compensate="off",
    )[0]
    assert (best.layer, best.criterion, len(best.filters)) == (layer, "l1", 1)
    assert f"{best.flops_reduction:.6f}" == flops_reduction
