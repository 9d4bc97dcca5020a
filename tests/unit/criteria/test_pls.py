"""VIP by hand, against scikit-learn, and from moments added up in any number of parts."""

import math

import pytest
import torch
from helpers import vip_by_scikit_learn

from laasp_ray.criteria.pls import Moments, vip
from laasp_ray.errors import SearchError


def moments(features, labels, pilot=None, classes=None):
    made = Moments.empty(features.mean(dim=0) if pilot is None else pilot, classes or int(labels.max()) + 1)
    made.add(features, labels)
    return made


def random_data(seed=0, images=200, columns=30, classes=5):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    centres = torch.randn(classes, columns, generator=generator)
    noise = torch.randn(images, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return 7 + (centres[labels] + noise) * torch.linspace(0.1, 50, columns), labels


def test_by_hand_of_one_component():
    # Centred columns (-1, -1, 1, 1), (-1, 1, -1, 1), (-3, -1, 1, 3), of variance 4/3, 4/3, 20/3; Y's first is
    # (1, 1, -1, -1) / 2, its second the negative. X'Y is -2, 0, -4, so w is as -2/sqrt(4/3), 0, -4/sqrt(20/3).
    features = torch.tensor([[-1.0, -1, -3], [-1, 1, -1], [1, -1, 1], [1, 1, 3]]) + 100
    squares = [4 / (4 / 3), 0.0, 16 / (20 / 3)]
    expected = [math.sqrt(3 * square / sum(squares)) for square in squares]
    assert vip(moments(features, torch.tensor([0, 0, 1, 1])), 1).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("components", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_scikit_learn(components, seed):
    features, labels = random_data(seed)
    found = vip(moments(features, labels), components)
    assert (found - vip_by_scikit_learn(features, labels, components)).abs().max() < 1e-6
    assert float(found.square().mean()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("components", [1, 2, 5])
def test_equals_scikit_learn_with_more_columns_than_images_and_a_constant_one(components):
    features, labels = random_data(2, images=40, columns=90)
    features[:, 17] = 0.1
    found = vip(moments(features, labels), components)
    assert (found - vip_by_scikit_learn(features, labels, components)).abs().max() < 1e-6
    assert float(found[17]) == 0


@pytest.mark.parametrize("pilot", [0.0, 6.5])
def test_the_pilot_changes_nothing(pilot):
    features, labels = random_data()
    shifted = moments(features, labels, torch.full((30,), pilot))
    assert (vip(shifted, 3) - vip(moments(features, labels), 3)).abs().max() < 1e-9


def test_a_pilot_keeps_what_the_plain_products_would_lose():
    features, labels = random_data()
    far = features.double() + 1e7
    exact = vip(moments(features, labels), 2)
    assert (vip(moments(far, labels), 2) - exact).abs().max() < 1e-6
    assert (vip(moments(far, labels, torch.zeros(30)), 2) - exact).abs().max() > 1e-6


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_add_up_to_the_whole(parts):
    features, labels = random_data()
    pilot, whole = features[:50].mean(dim=0), moments(features, labels, features[:50].mean(dim=0))
    total = Moments.empty(pilot, 5)
    for some, their in zip(features.chunk(parts), labels.chunk(parts), strict=True):
        total.merge(moments(some, their, pilot, classes=5))
    assert total.images == 200 and torch.equal(total.counts, whole.counts)
    torch.testing.assert_close(total.products, whole.products, rtol=1e-13, atol=1e-9)
    torch.testing.assert_close(vip(total, 3), vip(whole, 3), rtol=0, atol=1e-12)


def test_moments_of_another_pilot_do_not_add_up():
    features, labels = random_data()
    with pytest.raises(ValueError, match="pilot"):
        moments(features, labels).merge(moments(features, labels, torch.zeros(30)))
    with pytest.raises(ValueError, match="classes"):
        moments(features, labels).merge(moments(features, labels, classes=6))
    with pytest.raises(ValueError, match=r"features \(200, 29\)"):
        moments(features, labels).add(features[:, 1:], labels)


def test_a_class_without_images_changes_nothing():
    features, labels = random_data()
    assert torch.allclose(vip(moments(features, labels, classes=9), 2), vip(moments(features, labels), 2), atol=1e-12)


def test_components_end_when_the_labels_are_told():
    labels = torch.tensor([0, 1] * 10)
    assert vip(moments(labels.double().unsqueeze(1) * 3, labels), 5).tolist() == pytest.approx([1.0])
    features, labels = random_data(3, images=12, columns=40, classes=3)  # 11 dimensions explain everything
    assert torch.allclose(vip(moments(features, labels), 11), vip(moments(features, labels), 30), atol=1e-6)


def test_what_tells_nothing_is_an_error():
    features, labels = random_data()
    with pytest.raises(SearchError, match="no feature of the 200 images tells"):
        vip(moments(torch.ones(200, 3), labels), 2)
    with pytest.raises(SearchError, match="tells their classes apart"):
        vip(moments(features, torch.zeros(200, dtype=torch.int64)), 2)
    with pytest.raises(SearchError, match="two images at least, has 1"):
        vip(moments(features[:1], labels[:1]), 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_named(value):
    features, labels = random_data()
    features[3, 7] = value
    with pytest.raises(SearchError, match=r"1 of 30 features are not finite \(columns \[7\]\)"):
        vip(moments(features, labels, torch.zeros(30)), 2)
