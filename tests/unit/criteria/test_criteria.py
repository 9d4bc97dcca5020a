import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laasp_ray import criteria
from laasp_ray.errors import ConfigError, SearchError

# Rows at (3, 4), (0, 0), (0, 4) and (-6, -8).
ROWS = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 4.0], [-6.0, -8.0]])
D = math.sqrt(36 + 144)  # from (0, 4) to (-6, -8)


def sums_to_one(weights):
    return weights.sum(dim=1)


def wrong_shape(weights):
    return weights


def fails(weights):
    return {}["no such key"]


def not_a_number(weights):
    return weights.sum(dim=1) / 0 * 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", [7.0, 0.0, 4.0, 14.0]),
        ("l2", [5.0, 0.0, 4.0, 10.0]),
        ("euclidean", [5 + 3 + 15, 5 + 4 + 10, 3 + 4 + D, 15 + 10 + D]),
        # similarities: (0,2) 0.8, (0,3) -1, (2,3) -0.8, a row with itself 1, the zero row 0 with all, itself included
        ("cosine", [4 - (1 + 0.8 - 1), 4.0, 4 - (1 + 0.8 - 0.8), 4 - (1 - 1 - 0.8)]),
        ("cosine_dissimilar", [-3.2, -4.0, -3.0, -4.8]),
    ],
)
def test_scores_by_hand(name, expected):
    assert criteria.scores(name, ROWS).tolist() == pytest.approx(expected)


def test_scores_flatten_a_convolution():
    weight = torch.tensor([[[[1.0, -2.0]], [[3.0, 0.0]]], [[[0.0, 0.0]], [[1.0, 1.0]]]])
    assert criteria.scores("l1", weight).tolist() == [6.0, 2.0]


def test_transposed_convolution_is_scored_by_its_outputs():
    plain = nn.ConvTranspose2d(3, 2, 1)
    plain.weight.data = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]).reshape(3, 2, 1, 1)
    assert criteria.scores("l1", plain).tolist() == [6.0, 60.0]
    grouped = nn.ConvTranspose2d(4, 4, 1, groups=2)  # inputs 0, 1 make outputs 0, 1; inputs 2, 3 outputs 2, 3
    grouped.weight.data = torch.tensor([[1.0, 10.0], [2.0, 20.0], [100.0, 1000.0], [200.0, 2000.0]]).reshape(4, 2, 1, 1)
    assert criteria.scores("l1", grouped).tolist() == [3.0, 30.0, 300.0, 3000.0]


@pytest.mark.parametrize("name", ["euclidean", "cosine"])
def test_equal_filters_get_equal_scores(name):
    weights = torch.randn(300, 129, generator=torch.Generator().manual_seed(0))
    weights[211] = weights[7]
    result = criteria.scores(name, weights)
    assert result[211] == result[7]


def test_euclidean_agrees_with_direct_distances():
    weights = torch.randn(40, 27, generator=torch.Generator().manual_seed(1)).double()
    direct = (weights[:, None] - weights[None]).square().sum(2).sqrt().sum(1)
    torch.testing.assert_close(criteria.scores("euclidean", weights), direct)


@pytest.mark.parametrize("shape", [(64, 3 * 49), (96, 1), (256, 64), (48, 9), (512, 512 * 9), (2, 27)])
def test_cosine_chooses_as_its_definition_in_double_precision(shape):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    if shape[0] > 2:  # of two filters with one direction the definition's own scores are nothing but rounding
        weights[shape[0] // 2] = weights[0] * 4
    directions = F.normalize(weights.double(), dim=1)
    direct = (1 - directions @ directions.T).sum(dim=1).float()
    found = criteria.scores("cosine", weights)
    torch.testing.assert_close(found, direct, rtol=1e-6, atol=1e-12 * shape[0])
    for count in (1, shape[0] // 3, shape[0] // 2):
        assert criteria.lowest(found, count) == criteria.lowest(direct, count)


def test_cosine_and_dissimilar_choose_opposite_filters():
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.5]])
    assert criteria.lowest(criteria.scores("cosine", weights), 1) == (1,)
    assert criteria.lowest(criteria.scores("cosine_dissimilar", weights), 1) == (2,)


@pytest.mark.parametrize(
    ("scores", "count", "blocks", "expected"),
    [
        ([3.0, 1.0, 2.0, 1.0], 1, 1, (1,)),
        ([3.0, 1.0, 2.0, 1.0], 2, 1, (1, 3)),
        ([3.0, 1.0, 2.0, 1.0], 3, 1, (1, 2, 3)),
        ([0.0, 0.0, 0.0, 0.0], 2, 1, (0, 1)),
        ([0.0, 1.0, 5.0, 4.0], 2, 2, (0, 3)),
        ([0.0, 1.0, 5.0, 4.0], 2, 1, (0, 1)),
        ([0.0, math.inf, -math.inf, 4.0], 1, 1, (2,)),
        ([1.0, 2.0], 0, 1, ()),
    ],
)
def test_lowest(scores, count, blocks, expected):
    assert criteria.lowest(torch.tensor(scores), count, blocks) == expected


@pytest.mark.parametrize(("count", "blocks"), [(3, 2), (2, 3), (5, 1)])
def test_lowest_refuses_counts_that_do_not_divide(count, blocks):
    with pytest.raises(ValueError, match=f"{count} lowest"):
        criteria.lowest(torch.zeros(4), count, blocks)


def test_nan_is_an_error_naming_criterion_and_filter():
    weights = torch.zeros(3, 2)
    weights[1, 0] = math.nan
    with pytest.raises(SearchError, match=r"'l1' gives NaN for filters \[1\]"):
        criteria.scores("l1", weights)
    with pytest.raises(SearchError, match=r"\[2\]"):
        criteria.lowest(torch.tensor([0.0, 1.0, math.nan]), 1)


def test_default_pool_is_known():
    assert criteria.known() == ("l1", "l2", "euclidean", "cosine", "cosine_dissimilar", "obs", "pls")


def test_a_criterion_of_activations_is_no_function_of_a_weight():
    with pytest.raises(ConfigError, match="'pls' scores activations, not weights"):
        criteria.scores("pls", ROWS)
    with pytest.raises(ConfigError, match="did you mean pls"):
        criteria.get("plss")


def test_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean euclidean.*l1, l2, euclidean, cosine, cosine_dissimilar"):
        criteria.get("euclidian")


def test_import_path():
    path = f"{__name__}:sums_to_one"
    assert criteria.scores(path, ROWS).tolist() == [7.0, 0.0, 4.0, -14.0]
    with pytest.raises(ConfigError, match=r"must give a tensor of shape \(4,\).*gave \(4, 2\)"):
        criteria.scores(f"{__name__}:wrong_shape", ROWS)
    with pytest.raises(ConfigError, match=r":fails' failed on weights of shape \(4, 2\): KeyError: 'no such key'"):
        criteria.scores(f"{__name__}:fails", ROWS)
    with pytest.raises(SearchError, match="not_a_number"):
        criteria.scores(f"{__name__}:not_a_number", ROWS)


@pytest.mark.parametrize("path", ["no_such_module:f", f"{__name__}:missing", ":", f"{__name__}:ROWS"])
def test_bad_import_path(path):
    with pytest.raises(ConfigError, match="criterion"):
        criteria.get(path)


def test_a_taken_name_is_refused():
    with pytest.raises(ConfigError, match="'l1' is registered"):
        criteria.register("l1")(sums_to_one)


def test_registered_function_is_found():
    criteria.register("row_sum")(sums_to_one)
    try:
        assert criteria.get("row_sum") is sums_to_one
    finally:
        criteria.CRITERIA.pop("row_sum")


@pytest.mark.parametrize("name", ["l1", "l2", "euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_have_scores_that_are_not(name, dtype):
    # Hundreds of sums of thousands of weights are few different numbers in half precision.
    weights = torch.randn(512, 4608, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = criteria.scores(name, weights)
    assert found.dtype == torch.float32 and torch.equal(found, criteria.scores(name, weights.float()))
    assert len(found.unique()) > 400
