"""The first prune that the LAASP authors' log says, found again by an exhaustive search on other images."""

import dataclasses

import pytest
from helpers import shared_data

from laasp_ray.config import ModelConfig
from laasp_ray.data.loader import normalise
from laasp_ray.data.sources import open_source
from laasp_ray.data.subset import draw_subset
from laasp_ray.models import build, load_weights
from laasp_ray.recipes import recipe
from laasp_ray.search import rank


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_resnet20_at_epoch_100_is_pruned_first_where_the_log_says():
    weights = shared_data("checkpoints/resnet20_epoch100.safetensors")
    data = dataclasses.replace(recipe("resnet20_cifar10").data, path=str(shared_data("cifar10_mini")))
    model = build(ModelConfig(builder="cifar.resnet20", input_shape=(3, 32, 32)))
    load_weights(model, weights)
    subset = draw_subset(open_source(data, "train"), data, images=4000, seed=0)
    assert len(subset.labels) == 4000
    best = rank(model, subset.images, subset.labels, prepare=lambda batch: normalise(batch, data))[0]
    assert (best.layer, best.criterion, len(best.filters)) == ("layer1.0.conv1", "l1", 1)
    assert f"{best.flops_reduction:.6f}" == "0.007226"
