"""The methods that LAASP is compared with: what goes, how much of it, and within which limits."""

import collections
import dataclasses
import itertools
import random
from fractions import Fraction

import baselines
import pytest
import torch
from baselines import Room
from fakes import FakeExecutor
from helpers import first_standing, iterations_of, randomise_batchnorm

from laasp_ray import criteria, models
from laasp_ray.config import LaaspConfig, ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.errors import ExhaustedError
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.records import MeasuredLoss
from laasp_ray.search.candidates import measure_baseline

EXAMPLE = torch.zeros(1, 3, 8, 8)
CONFIG = LaaspConfig(flops_reduction=0.2, step=0.04)
FIRST_OF_THE_COUPLED = ["conv1", "layer2.0.conv2", "layer3.0.conv2"]
INSIDE_BLOCKS = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]


def room(filters, original=None, blocks=1, allowed=None):
    return Room(filters, original or filters, blocks, filters - blocks if allowed is None else allowed)


def one_by_one(rooms):
    """The layers in the order in which `evenly` takes filters from them."""
    taken, before = [], {}
    for counts in baselines.evenly(rooms):
        (layer,) = [name for name in counts if counts[name] != before.get(name, 0)]
        taken.append((layer, counts[layer] - before.get(layer, 0)))
        before = counts
    return taken


# --- how much of each layer -------------------------------------------------------------------------------------------


def test_the_next_filter_is_that_of_the_layer_that_has_lost_the_least_share():
    # Of 16 filters they go at 2/64, 6/64, 10/64, ... of the whole, of 32 at 1/64, 3/64, 5/64, ...
    taken = one_by_one({"a": room(16), "b": room(32)})
    assert [layer for layer, _ in taken[:8]] == ["b", "a", "b", "b", "a", "b", "b", "a"]
    assert collections.Counter(layer for layer, _ in taken) == {"a": 15, "b": 31}


def test_of_equal_shares_the_earlier_layer_is_next_and_what_is_gone_counts():
    assert [layer for layer, _ in one_by_one({"b": room(8), "a": room(8)})[:4]] == ["b", "a", "b", "a"]
    # a has lost 2 of 8: its next goes at 5/16, after those of b at 1/16 and 3/16, and with b's third, being earlier.
    assert [layer for layer, _ in one_by_one({"a": room(6, 8), "b": room(8)})[:4]] == ["b", "b", "a", "b"]


def test_a_layer_at_its_limit_gives_no_more_and_blocks_give_one_each():
    assert one_by_one({"a": room(8, allowed=1), "b": room(8, allowed=0)}) == [("a", 1)]
    # Two blocks of two: the one from each goes at 1/4, those of c at 1/8 and 3/8.
    assert one_by_one({"a": room(4, blocks=2, allowed=2), "c": room(4, allowed=2)}) == [("c", 1), ("a", 2), ("c", 1)]


def test_the_option_nearest_to_the_step_is_taken_and_none_after_it_looked_at():
    def taken(step):
        options = iter(range(1, 9))
        found = baselines.worth_about(options, lambda option: 0.75 * option, step)
        return found, next(options, None)

    assert taken(2.0) == (3, 4)  # 2.25 is nearer than 1.5
    assert taken(1.875) == (2, 4)  # as near as 2.25: the lesser
    assert taken(0.1) == (1, 2)  # one at least
    assert taken(9.0) == (8, None)  # all there are
    with pytest.raises(ExhaustedError, match="no layer has a filter left to give"):
        baselines.worth_about([], lambda option: 1.0, 0.02)


# --- random -----------------------------------------------------------------------------------------------------------


def test_random_picks_are_spread_over_layers_and_filters():
    rooms, draw = {"a": room(4), "b": room(40), "c": room(4)}, random.Random(0)
    picks = [baselines.random_pick(rooms, {"a": 2, "b": 1, "c": 0}, draw) for _ in range(2000)]
    layers = collections.Counter(layer for layer, _ in picks)
    assert set(layers) == {"a", "b"} and abs(layers["a"] - 1000) < 100  # 4.5 standard deviations
    of_a = collections.Counter(filters for layer, filters in picks if layer == "a")
    assert set(of_a) == set(itertools.combinations(range(4), 2))
    assert {filters for layer, filters in picks if layer == "b"} == {(index,) for index in range(40)}


def test_random_picks_take_as_many_of_each_block():
    picks = {baselines.random_pick({"a": room(6, blocks=2)}, {"a": 4}, random.Random(seed))[1] for seed in range(99)}
    assert picks == {
        (*first, *(3 + index for index in second))
        for first in itertools.combinations(range(3), 2)
        for second in itertools.combinations(range(3), 2)
    }
    with pytest.raises(ExhaustedError, match="no layer has a filter left to give"):
        baselines.random_pick({"a": room(6)}, {"a": 0}, random.Random(0))


# --- limits of PLS ----------------------------------------------------------------------------------------------------


def test_scores_beyond_what_may_go_are_infinite():
    scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([5.0, 4.0])}
    limited = baselines.within(scores, {"a": room(3, allowed=2), "b": room(2, allowed=0)})
    assert {layer: values.tolist() for layer, values in limited.items()} == {
        "a": [torch.inf, 1.0, 2.0],
        "b": [torch.inf, torch.inf],
    }
    assert scores["a"].tolist() == [3.0, 1.0, 2.0]


# --- iterations
# ------------------------------------------------------------------------------------------------------------


class FixedScores(FakeExecutor):
    """An executor that scores every filter by a number that does not change from iteration to iteration, and measures
    nothing."""

    def importance(self, network, wanted):
        return {name: network.tensors[f"{name}.weight"].flatten(1)[:, 0].clone() for name in wanted.layers}

    def measure(self, network, tasks, on_result, on_share, images=None, memory=None):
        return [MeasuredLoss(1.0 + position, 10, 0.0) for position in range(len(tasks))]


@pytest.fixture(scope="module")
def resnet20():
    torch.manual_seed(0)
    return randomise_batchnorm(models.build(ModelConfig(builder="cifar.resnet20", input_shape=(3, 32, 32)))).eval()


def iterations(model, method, config=CONFIG):
    """Iterations until the target, each on the physically pruned network: (iteration, network before, network
    after)."""
    for iteration, before, after in iterations_of(method, first_standing(model, EXAMPLE, config, FixedScores())):
        yield iteration, before, after
        if iteration.decision.flops_reduction >= config.flops_reduction:
            return


def removed(iteration):
    return {prune.layer: prune.filters for prune in iteration.decision.prunes}


def sizes(model):
    return {name: module.out_channels for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}


def test_of_coupled_layers_the_first_decides(resnet20):
    deciding = baselines.deciding_layers(PruningGraph(resnet20, EXAMPLE))
    assert sorted(deciding) == sorted([*FIRST_OF_THE_COUPLED, *INSIDE_BLOCKS])
    assert deciding == [name for name in sizes(resnet20) if name in deciding]


def test_uniform_takes_the_same_share_of_all_layers_lowest_l1_first(resnet20):
    original, reductions = sizes(resnet20), [0.0]
    for iteration, before, after in iterations(resnet20, baselines.UniformPruning()):
        for layer, filters in removed(iteration).items():
            norms = criteria.scores("l1", before.get_submodule(layer))
            assert filters == criteria.lowest(norms, len(filters))
        # There is a share s of which every layer has lost its part, rounded to whole filters.
        lost = {layer: (original[layer] - left, original[layer]) for layer, left in sizes(after).items()}
        most = max(Fraction(2 * gone - 1, 2 * of) for gone, of in lost.values())
        assert most <= min(Fraction(2 * gone + 1, 2 * of) for gone, of in lost.values())
        macs = count_macs(after, EXAMPLE).total / count_macs(resnet20, EXAMPLE).total
        assert iteration.decision.flops_reduction == pytest.approx(1 - macs, abs=1e-12)
        reductions.append(iteration.decision.flops_reduction)
    steps = [after - before for before, after in itertools.pairwise(reductions)]
    # No filter is worth more than 2.5%, and the nearest to 4% is taken.
    assert max(abs(step - 0.04) for step in steps) < 0.0125 and 4 <= len(steps) <= 6
    assert (iteration.decision.loss, iteration.decision.loss_before, iteration.decision.criterion) == (1.0, 2.0, "l1")


def test_pls_iterations_are_worth_the_step_and_take_the_lowest_scores_inside_the_blocks(resnet20):
    reductions = [0.0]
    for iteration, before, _ in iterations(resnet20, baselines.PlsByFlops()):
        for layer, filters in removed(iteration).items():
            scores = before.get_submodule(layer).weight.flatten(1)[:, 0]
            assert filters == criteria.lowest(scores, len(filters))
        assert set(removed(iteration)) <= set(INSIDE_BLOCKS)
        reductions.append(iteration.decision.flops_reduction)
    steps = [after - before for before, after in itertools.pairwise(reductions)]
    # One filter of the first stage is worth 0.72%.
    assert max(abs(step - 0.04) for step in steps) < 0.0037 and 5 <= len(steps) <= 6
    assert iteration.decision.criterion == "pls" and iteration.seconds.keys() == {"graph", "score", "evaluate"}


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        (baselines.PlsByFlops(), INSIDE_BLOCKS),
        (baselines.UniformPruning(), FIRST_OF_THE_COUPLED + INSIDE_BLOCKS),
        (baselines.RandomPruning(0), FIRST_OF_THE_COUPLED + INSIDE_BLOCKS),
    ],
)
def test_every_layer_keeps_within_its_limit(resnet20, method, layers):
    config = dataclasses.replace(CONFIG, flops_reduction=0.9, step=0.1, max_pruned=0.13)  # 2 of 16, 4 of 32, 8 of 64
    after = resnet20
    with pytest.raises(ExhaustedError, match="no layer has a filter left to give"):
        for _, _, now in iterations(resnet20, method, config):
            after = now
    original, left = sizes(resnet20), sizes(after)
    assert all(original[layer] - left[layer] == original[layer] // 8 for layer in layers)


def test_random_iterations_follow_from_seed_and_iteration(resnet20):
    def decisions(seed):
        found = itertools.islice(iterations(resnet20, baselines.RandomPruning(seed)), 3)
        return [(iteration.decision.layer, iteration.decision.filters) for iteration, _, _ in found]

    first = decisions(0)
    assert decisions(0) == first and decisions(1) != first
    assert len(set(first)) == 3
    step_sizes = measure_baseline(PruningGraph(resnet20, EXAMPLE), count_macs(resnet20, EXAMPLE), CONFIG).step_sizes
    assert all(len(filters) == step_sizes[layer] for layer, filters in first)


def test_gradients_are_those_of_the_summed_loss_over_all_parts(monkeypatch):
    monkeypatch.setattr(baselines, "GRADIENTS_AT_ONCE", 2)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2, affine=False, eps=0), torch.nn.Linear(2, 2))
    torch.nn.init.zeros_(model[1].weight)
    torch.nn.init.zeros_(model[1].bias)
    images = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = baselines.gradients_of(model, images, torch.tensor([0, 1, 1]))
    # Both classes have probability 1/2, so that an image adds -1/2 to its own class and 1/2 to the other.
    assert found["1.bias"].tolist() == [0.5, -0.5]
    assert found["1.weight"].tolist() == [[(3 + 5 - 1) / 2, (4 + 6 - 2) / 2], [(1 - 3 - 5) / 2, (2 - 4 - 6) / 2]]
    assert model[1].weight.grad is None and model[0].num_batches_tracked == 0


@pytest.mark.parametrize("layer", ["layer1.0.conv1", "layer1.2.conv1"])
def test_torch_prunings_taylor_takes_the_filters_without_gradients(resnet20, monkeypatch, layer):
    silent = [1, 4, 5, 8, 11, 13]  # a filter of the first stage is worth 0.72%, the step is 4%

    def gradients(model, images, labels):
        found = {name: torch.ones_like(value) for name, value in model.named_parameters()}
        for name in (layer, layer.replace("conv", "bn")):
            found[f"{name}.weight"][silent] = 0
        found[f"{layer[:-1]}2.weight"][:, silent] = 0
        return found

    monkeypatch.setattr(baselines, "gradients_of", gradients)
    taylor = baselines.TorchPruning("GroupTaylorImportance", object())
    monkeypatch.setattr(type(taylor), "_images", (None, None))
    first, _, _ = next(iter(iterations(resnet20, taylor)))
    assert removed(first) == {layer: tuple(silent)}
