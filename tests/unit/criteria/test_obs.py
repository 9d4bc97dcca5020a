"""obs: the costs and the order by hand, and by brute force."""

import pytest
import torch

from laasp_ray import criteria
from laasp_ray.criteria.obs import ReadFilters, missed_least, scores_from
from laasp_ray.errors import ConfigError


def brute_force(weights, covariance, lost, filters):
    """What a reader's outputs lose in square without `lost` filters' inputs, the others making up for them."""
    gone = [index for one in lost for index in filters[one]]
    kept = [index for index in range(len(covariance)) if index not in gone]
    left = covariance[gone][:, gone]
    if kept:
        across = covariance[gone][:, kept]
        left = left - across @ torch.linalg.solve(covariance[kept][:, kept], across.T)
    own = weights[:, gone]
    return float(torch.trace(own @ left @ own.T))


def drawn(filters, each, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    size = filters * each
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    covariance = mix @ mix.T + 0.1 * torch.eye(size, dtype=torch.float64)
    weights = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    inputs = torch.arange(size).reshape(filters, each)
    return ReadFilters(torch.arange(filters), inputs, weights, torch.linalg.inv(covariance)), covariance


def test_independent_inputs_cost_their_weights_times_their_variance():
    # Variances 4, 1, 9; squares of weights 1, 9, 0.25: costs 4, 9, 2.25.
    weights = torch.tensor([[1.0, 3.0, 0.5]], dtype=torch.float64)
    inverse = torch.diag(torch.tensor([1 / 4, 1.0, 1 / 9], dtype=torch.float64))
    reader = ReadFilters(torch.arange(3), torch.arange(3).unsqueeze(1), weights, inverse)
    assert missed_least([reader], 3, 2) == [2, 0]
    # A second reader that weighs the third filter: 2.25 + 4 * 9 is the most.
    other = ReadFilters(torch.arange(3), torch.arange(3).unsqueeze(1), torch.tensor([[0.0, 0, 2]]).double(), inverse)
    assert missed_least([reader, other], 3, 2) == [0, 1]


@pytest.mark.parametrize("each", [1, 3])
def test_each_filter_taken_is_the_one_that_costs_least_after_those_before(each):
    (one, first), (two, second) = drawn(5, each, 4, 1), drawn(5, each, 2, 2)
    filters = one.inputs.tolist()
    order = missed_least([one, two], 5, 4)
    taken = []
    for found in order:

        def cost(index, taken=taken):
            lost = [*taken, index]
            return brute_force(one.weights, first, lost, filters) + brute_force(two.weights, second, lost, filters)

        assert found == min((index for index in range(5) if index not in taken), key=cost)
        taken.append(found)


def test_blocks_lose_the_same_number_and_equal_costs_go_to_the_lower():
    weights = torch.tensor([[1.0, 1, 5, 5]], dtype=torch.float64)
    reader = ReadFilters(torch.arange(4), torch.arange(4).unsqueeze(1), weights, torch.eye(4, dtype=torch.float64))
    assert missed_least([reader], 4, 2) == [0, 1]
    assert missed_least([reader], 4, 2, blocks=2) == [0, 2]


def test_scores_give_the_order_back():
    assert criteria.lowest(scores_from([3, 1], 5), 2) == (1, 3)
    assert scores_from([3, 1], 5).tolist() == [2, 1, 2, 0, 2]


def test_weights_alone_are_refused():
    with pytest.raises(ConfigError, match="'obs' scores what other layers read"):
        criteria.scores("obs", torch.ones(3, 3))
