"""VIP for responses that are numbers, against scikit-learn's fit, and in parts."""

import warnings

import pytest
import torch
from sklearn.cross_decomposition import PLSRegression

from laasp_ray.criteria.of_data import FirstBatch
from laasp_ray.criteria.pls import Moments, Pls, vip
from laasp_ray.errors import SearchError


def data(images=40, columns=6, responses=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(images, columns, generator=draw) + 5
    mixed = features @ torch.randn(columns, responses, generator=draw) + torch.randn(images, responses, generator=draw)
    return features, mixed * torch.tensor([1.0, 100.0, 0.01][:responses]) + 7


def moments(features, responses):
    made = Moments.empty(features.mean(0), responses.shape[1], responses=True)
    made.add(features, responses)
    return made


def by_scikit_learn(features, responses, components):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PLSRegression(components, scale=True, tol=1e-16, max_iter=20_000)
        fit = model.fit(features.double(), responses.double())
    scores, weights, loadings = map(torch.from_numpy, (fit.x_scores_, fit.x_weights_, fit.y_loadings_))
    explained = scores.square().sum(dim=0) * loadings.square().sum(dim=0)
    directions = (weights / weights.norm(dim=0)).square()
    return (len(weights) * directions @ explained / explained.sum()).sqrt()


@pytest.mark.parametrize(("responses", "components"), [(1, 1), (1, 3), (3, 2), (3, 4)])
def test_it_equals_scikit_learns(responses, components):
    features, targets = data(responses=responses)
    torch.testing.assert_close(
        vip(moments(features, targets), components), by_scikit_learn(features, targets, components), rtol=1e-8, atol=0
    )


def test_class_labels_as_numbers_give_what_labels_give():
    features, _ = data()
    labels = torch.arange(40) % 3
    by_label = Moments.empty(features.mean(0), 3)
    by_label.add(features, labels)
    one_hot = torch.nn.functional.one_hot(labels).double()
    torch.testing.assert_close(vip(by_label, 2), vip(moments(features, one_hot), 2), rtol=1e-10, atol=0)


def test_parts_add_up():
    features, targets = data()
    whole = moments(features, targets)
    parts = [Moments.empty(features.mean(0), 3, responses=True) for _ in range(2)]
    parts[0].add(features[:13], targets[:13])
    parts[1].add(features[13:], targets[13:])
    parts[0].merge(parts[1])
    assert parts[0].images == whole.images == 40
    torch.testing.assert_close(vip(parts[0], 2), vip(whole, 2), rtol=1e-10, atol=0)


def test_a_response_that_never_changes_counts_for_nothing():
    features, targets = data(responses=1)
    fixed = torch.cat([targets, torch.full((40, 1), 0.1)], 1)
    torch.testing.assert_close(vip(moments(features, fixed), 2), vip(moments(features, targets), 2), rtol=1e-10, atol=0)
    with pytest.raises(SearchError, match="no feature of the 40 images tells their responses apart"):
        vip(moments(features, fixed[:, 1:]), 2)


def test_the_criterion_starts_for_responses():
    features, targets = data(columns=4)
    first = FirstBatch({"layer": features.double().mean(0).reshape(4, 1)}, 3, responses=True)
    state = Pls().accumulate(Pls().start(first), {"layer": features.unsqueeze(2)}, targets)
    scores = Pls(components=2).scores(state, first.shapes)["layer"]
    torch.testing.assert_close(scores, vip(moments(features, targets), 2), rtol=1e-10, atol=0)
