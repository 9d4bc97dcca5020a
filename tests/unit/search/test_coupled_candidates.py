"""Layers of one coupled group whose picks remove the same channels are one candidate."""

import pytest
import torch
from torch import nn

from laasp_ray.config import LaaspConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.pruning.graph import PruningGraph, reachable
from laasp_ray.records import CandidateLoss, MeasuredLoss, Ranking
from laasp_ray.search import rank
from laasp_ray.search.candidates import measure_baseline, propose

IMAGES = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """`stem` and `second` make the same four channels; `first` is between them and has two of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.second, self.head = nn.Conv2d(2, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.second(self.first(x).relu())).mean((2, 3)))


def network(**smallest):
    """A Residual of ones in which these filters of these layers are the smallest, one after the other."""
    model = Residual()
    with torch.no_grad():
        for name, filters in smallest.items():
            weight = model.get_parameter(f"{name}.weight").fill_(1)
            for position, index in enumerate(filters):
                weight[index] *= 0.1 * (position + 1)
    return model


def proposals(model, criteria=("l1",), step=1e-6):
    graph, macs = PruningGraph(model, IMAGES), count_macs(model, IMAGES)
    config = LaaspConfig(flops_reduction=0.5, criteria=criteria, step=step, step_rule="layer_share")
    return propose(model, graph, macs, measure_baseline(graph, macs, config), config)


def layers_and_picks(found):
    return [(p.candidate.layer, p.candidate.filters, p.candidate.also) for p in found]


def test_the_same_channels_are_one_candidate_credited_to_the_first_layer():
    found = proposals(network(stem=[2], first=[1], second=[2]))
    assert layers_and_picks(found) == [("stem", (2,), (("second", "l1"),)), ("first", (1,), ())]
    # what it removes: filter 2 of both, and their readers' input 2
    assert set(found[0].step.layers) == {"stem", "second"}
    assert found[0].mask == {"first": (2,), "head": (2,)}


def test_different_channels_are_two_candidates():
    found = proposals(network(stem=[2], first=[1], second=[3]))
    assert layers_and_picks(found) == [("stem", (2,), ()), ("first", (1,), ()), ("second", (3,), ())]
    assert found[0].mask == {"first": (2,), "head": (2,)}
    assert found[2].mask == {"first": (3,), "head": (3,)}


def test_the_same_numbers_in_layers_that_are_not_coupled_are_two_candidates():
    found = proposals(network(stem=[1], first=[1], second=[1]))
    assert layers_and_picks(found) == [("stem", (1,), (("second", "l1"),)), ("first", (1,), ())]


def test_every_criterion_that_proposed_it_is_named_in_order():
    found = proposals(network(stem=[2], first=[1], second=[2]), criteria=("l2", "l1"))
    assert found[0].candidate.criterion == "l2"
    assert found[0].candidate.also == (("stem", "l1"), ("second", "l2"), ("second", "l1"))


def test_the_same_filters_in_another_order_of_smallness_are_one_candidate():
    found = proposals(network(stem=[0, 3], first=[1], second=[3, 0]), step=0.5)
    assert layers_and_picks(found)[0] == ("stem", (0, 3), (("second", "l1"),))


def test_a_ranking_finds_a_shared_candidate_by_either_layer():
    found = proposals(network(stem=[2], first=[1], second=[2]))
    losses = {"stem": 0.5, "first": 0.4}
    ranking = Ranking(
        [CandidateLoss(candidate=p.candidate, measured=MeasuredLoss(losses[p.candidate.layer], 4)) for p in found]
    )
    assert ranking.rank_of("first", "l1") == 1
    assert ranking.rank_of("stem", "l1") == ranking.rank_of("second", "l1") == 2
    with pytest.raises(KeyError, match="'second' by 'l2'"):
        ranking.rank_of("second", "l2")


def test_rank_measures_it_once():
    model = network(stem=[2], first=[1], second=[2])
    ranking = rank(model, IMAGES, torch.arange(4) % 2, criteria=("l1",), step=1e-6)
    assert len(ranking) == 2
    assert ranking.rank_of("second", "l1") == ranking.rank_of("stem", "l1")
    assert {entry.layer for entry in ranking} == {"stem", "first"}


class PartOfAJoin(nn.Module):
    """`each` meets the two channels of `small` beside six others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.small, self.large = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 6, 1)
        self.each, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.each(torch.cat([self.small(x), self.large(x)], 1)).mean((2, 3)))


def test_a_pick_that_would_leave_nothing_of_another_layer_is_no_candidate():
    model = PartOfAJoin()
    model.each.weight.data[:2] *= 1e-3
    found = proposals(model, criteria=("l1", "l2"), step=0.25)
    assert found and all(set(p.candidate.filters) != {0, 1} for p in found if p.candidate.layer == "each")
    graph, macs = PruningGraph(model, IMAGES), count_macs(model, IMAGES)
    assert 0 < reachable(graph, macs, max_pruned=0.75, layers=["each"]) < 1
