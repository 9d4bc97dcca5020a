"""Pooled outputs of filters, their moments in chunks, and the scores of the criterion pls that come of them."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from laasp_ray.criteria import pooled
from laasp_ray.criteria.pls import Moments, Pls, vip
from laasp_ray.errors import ConfigError, SearchError
from laasp_ray.search import rank
from laasp_ray.search.activations import (
    ImportanceRequest,
    chunks_of,
    importance,
    measure_first_batch,
    scores_of,
    shapes_of,
    state_of,
)
from laasp_ray.search.evaluate import CalibrationSet

PICTURE = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, -9.0]]]])
LAYERS = ("0", "2")


def pls(pooling, components):
    return ImportanceRequest(LAYERS, "pls", Pls(components, pooling))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    ).eval()


def calibration(images=70, batch_size=4):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(images) % 3
    pixels = torch.randn(images, 3, 8, 8, generator=generator) + labels.reshape(-1, 1, 1, 1) * 0.3
    return CalibrationSet(pixels, labels, batch_size)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("max", [8.0]),
        ("avg", [3.0]),
        ("max2x2", [5.0, 6.0, 8.0, -9.0]),
        ("avg2x2", [3.0, 4.5, 7.5, -9.0]),
        ("max1x2", [2.0, 3.0, 5.0, 6.0, 8.0, -9.0]),
        ("avg3x8", [3.0]),
        ("max9x9", [8.0]),
    ],
)
def test_pooling_by_hand(pooling, expected):
    assert pooled(PICTURE, pooling).tolist() == [[expected]]


def test_outputs_without_places_are_taken_as_they_are():
    assert pooled(torch.tensor([[1.0, 2.0]]), "max2x2").tolist() == [[[1.0], [2.0]]]
    assert pooled(torch.tensor([[[1.0, 5.0], [2.0, 4.0]]]), "max").tolist() == [[[5.0], [4.0]]]
    with pytest.raises(ConfigError, match=r"'max2x2' has windows .*shape \(1, 2, 2\)"):
        pooled(torch.zeros(1, 2, 2), "max2x2")


@pytest.mark.parametrize("pooling", ["max", "avg", "max2x2"])
def test_importance_is_that_of_all_features_at_once_averaged_over_windows(pooling):
    model, images = network(), calibration()
    with torch.no_grad():
        first = model[0](images.images)
        outputs = [pooled(first, pooling), pooled(model[2](model[1](first)), pooling)]
    features = torch.cat([output.flatten(1) for output in outputs], dim=1)
    whole = Moments.empty(torch.zeros(features.shape[1]), 3)
    whole.add(features, images.labels)
    columns = vip(whole, 2)
    found = importance(model, images, pls(pooling, 2))
    split = columns.split([output[0].numel() for output in outputs])
    for layer, values, output in zip(LAYERS, split, outputs, strict=True):
        expected = values.reshape(output.shape[1:]).mean(dim=1)
        torch.testing.assert_close(found[layer], expected, rtol=0, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_importance_does_not_depend_on_who_measures_the_chunks():
    model, images, wanted = network(), calibration(), pls("max", 2)
    look, chunks = measure_first_batch(model, images, wanted), chunks_of(70, 4)
    serial = importance(model, images, wanted)
    for workers in (1, 2, 5):
        # Each worker measures every so-manieth chunk; the driver adds them up in their order.
        by_worker = [
            {
                number: state_of(model, images, wanted, look, chunks[number])
                for number in range(start, len(chunks), workers)
            }
            for start in range(workers)
        ]
        parts = (by_worker[number % workers][number] for number in range(len(chunks)))
        spread = scores_of(parts, look, wanted)
        assert all(torch.equal(spread[layer], serial[layer]) for layer in LAYERS)


def test_chunks_are_whole_batches_and_not_too_many():
    assert [len(chunk) for chunk in chunks_of(10, 4)] == [4, 4, 2]
    many = chunks_of(1003, 10)  # 101 batches, four in a chunk
    assert len(many) == 26 and {len(chunk) for chunk in many[:-1]} == {40}
    assert np.concatenate(many).tolist() == list(range(1003))


def test_shapes_tell_filters_and_windows():
    model = network().train()
    assert shapes_of(model, torch.zeros(1, 3, 8, 8), pls("max2x2", 1)) == {
        "0": (4, 9),
        "2": (5, 4),
    }
    assert model.training


def test_a_layer_that_runs_twice_has_windows_of_both_times():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x)).flatten(1)

    wanted = ImportanceRequest(("conv",), "pls", Pls(1, "max"))
    assert shapes_of(Twice(), torch.zeros(1, 3, 2, 2), wanted) == {"conv": (3, 2)}


def test_more_features_than_memory_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"'max2x2' gives 10000000 features.*larger windows"):
        Pls(2, "max2x2").check({"a": (10, 10**6)}, torch.device("cpu"))


def test_outputs_that_are_not_finite_name_the_layer():
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(SearchError, match="the outputs of 2 are not finite"):
        importance(model, calibration(), pls("max", 2))


def test_a_ranking_can_have_the_criterion_pls_in_its_pool():
    images = calibration()
    model = network()
    ranking = rank(model, images.images, images.labels, criteria=("l1", "pls"), step=0.3, pooling="avg", components=1)
    found = importance(model, dataclasses.replace(images, batch_size=250), pls("avg", 1))
    for layer in LAYERS:
        entry = ranking[ranking.rank_of(layer, "pls") - 1]
        assert entry.filters == tuple(sorted(found[layer].argsort(stable=True)[: len(entry.filters)].tolist()))
