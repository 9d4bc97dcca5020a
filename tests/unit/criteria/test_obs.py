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


def taken_in_turn(readers, filters, count, blocks=1):
    """The order by the definition itself: every block of the inverse, and all weights, are changed by every filter."""
    inverses = [reader.inverse.clone() for reader in readers]
    weights = [reader.weights.clone() for reader in readers]
    left, order = [count // blocks] * blocks, []
    for _ in range(count):
        costs = torch.zeros(filters, dtype=torch.float64)
        for reader, inverse, weight in zip(readers, inverses, weights, strict=True):
            for index, inputs in zip(reader.filters.tolist(), reader.inputs, strict=True):
                if index not in order:
                    own = weight[:, inputs]
                    costs[index] += torch.trace(own @ torch.linalg.inv(inverse[inputs][:, inputs]) @ own.T)
        closed = [index for index in range(filters) if index in order or not left[index * blocks // filters]]
        costs[closed] = torch.inf
        best = int(costs.argmin())
        order.append(best)
        left[best * blocks // filters] -= 1
        for reader, inverse, weight in zip(readers, inverses, weights, strict=True):
            if best in reader.filters.tolist():
                inputs = reader.inputs[reader.filters.tolist().index(best)]
                inner = torch.linalg.inv(inverse[inputs][:, inputs])
                weight -= weight[:, inputs] @ inner @ inverse[inputs]
                inverse -= inverse[:, inputs] @ inner @ inverse[inputs].clone()
    return order


@pytest.mark.parametrize("each", [1, 2, 4, 9])
@pytest.mark.parametrize("rows", [3, 200])  # fewer and more than inputs
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_order_is_that_of_the_definition(each, rows, blocks):
    # Two readers of all filters and others of some (as groups have), of inputs in any order, beside inputs of others.
    generator = torch.Generator().manual_seed(each * rows + blocks)
    readers = []
    for some, others in ((24, 0), (24, 7), (12, 3), (10, 0)):
        size = some * each + others
        mix = torch.randn(size, size // 2, generator=generator, dtype=torch.float64)  # fewer patches than inputs
        covariance = mix @ mix.T / size + 1e-3 * torch.eye(size, dtype=torch.float64)
        inputs = torch.randperm(size, generator=generator)[: some * each].reshape(some, each)
        weights = torch.randn(rows, size, generator=generator, dtype=torch.float64)
        filters = torch.randperm(24, generator=generator)[:some]
        readers.append(ReadFilters(filters, inputs, weights, torch.linalg.inv(covariance)))
    kept = [(reader.weights.clone(), reader.inverse.clone()) for reader in readers]
    assert missed_least(readers, 24, 21, blocks) == taken_in_turn(readers, 24, 21, blocks)
    for reader, (weights, inverse) in zip(readers, kept, strict=True):  # they are not written to
        assert torch.equal(reader.weights, weights) and torch.equal(reader.inverse, inverse)


@pytest.mark.parametrize("rows", [4, 100])
@pytest.mark.parametrize("taps", [1, 3, 4])
def test_inputs_that_are_always_zero_do_not_change_the_order(rows, taps):
    # Of each filter's four inputs the first `taps` are always 0 (of a map of one place: all taps but one).
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.arange(80).reshape(20, 4)
    mix = torch.randn(80, 40, generator=generator, dtype=torch.float64)
    mix[inputs[:, :taps].flatten()] = 0
    inverse = torch.linalg.inv(mix @ mix.T / 40 + 1e-2 * torch.eye(80, dtype=torch.float64))
    inverse[inputs[:, :taps].flatten()] = 0
    inverse[:, inputs[:, :taps].flatten()] = 0
    inverse[inputs[:, :taps].flatten(), inputs[:, :taps].flatten()] = 100
    reader = ReadFilters(torch.arange(20), inputs, torch.randn(rows, 80, generator=generator).double(), inverse)
    assert missed_least([reader], 20, 15) == taken_in_turn([reader], 20, 15)


def test_equal_filters_are_taken_in_their_order():
    # Filters 0 and 5, 1 and 4, 2 and 3 are equal in all their readers' weights and in what they have with others.
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(-2, 3, (6, 6), generator=generator).double()
    mirrored = torch.cat([torch.cat([half, half.flip(1)], 1), torch.cat([half.flip(0), half.flip(1).flip(0)], 1)])
    inverse = 64 * torch.eye(12, dtype=torch.float64) + mirrored + mirrored.T
    inputs = torch.tensor([[0, 1], [2, 3], [4, 5], [7, 6], [9, 8], [11, 10]])
    weights = torch.tensor([[3.0, 1, 5, 2, 1, 1], [1.0, 2, 0, 4, 2, 1]], dtype=torch.float64)
    reader = ReadFilters(torch.arange(6), inputs, torch.cat([weights, weights.flip(1)], 1), inverse)
    order = missed_least([reader], 6, 3)
    assert order == taken_in_turn([reader], 6, 3)
    assert order[0] < 3


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
