"""The last prune takes no more filters than the target needs: counts by hand."""

import dataclasses

import pytest
import torch
from torch import nn

from laasp_ray.config import LaaspConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.plan import macs_after
from laasp_ray.search.candidates import counts_of, measure_baseline

EXAMPLE = torch.zeros(1, 2, 4, 4)


def counts(flops_reduction, **changes):
    """Of a network whose layers take 2 x 10, 10 x 10 and 10 x 1 multiply-accumulates at each of 16 places: 130."""
    model = nn.Sequential(nn.Conv2d(2, 10, 1), nn.Conv2d(10, 10, 1), nn.Conv2d(10, 1, 1)).eval()
    graph, macs = PruningGraph(model, EXAMPLE), count_macs(model, EXAMPLE)
    config = LaaspConfig(flops_reduction=flops_reduction, step=0.4, **changes)
    return counts_of(graph, macs, measure_baseline(graph, macs, config), config)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        # A filter of "0" is worth 2 + 10 of 130, one of "1" 10 + 1: a step of 52 is 4 or 5 of them.
        (0.9, {"0": 4, "1": 5}),
        (12 / 130, {"0": 1, "1": 2}),
        (13 / 130, {"0": 2, "1": 2}),
        (33 / 130, {"0": 3, "1": 3}),
        (0.0, {"0": 4, "1": 5}),  # without a target there is nothing to be exact about
    ],
)
def test_as_many_as_the_target_needs(target, expected):
    assert counts(target) == expected


def test_not_without_exact_targets_and_in_multiples_with_rounding():
    assert counts(12 / 130, exact_target=False) == {"0": 4, "1": 5}
    assert counts(12 / 130, round_to=5) == {"0": 5, "1": 5}


def test_all_targets_must_be_reached_and_latency_is_not_known():
    # 30 + 110 + 11 = 151 parameters: a filter of "0" has 3 + 10, one of "1" 11 + 1.
    assert counts(12 / 130, parameters_reduction=26 / 151) == {"0": 2, "1": 3}
    assert counts(12 / 130, latency_reduction=0.1) == {"0": 4, "1": 5}


def test_a_target_of_whole_filters_is_reached_by_them_although_shares_are_rounded():
    # A filter is a tenth of all: 1 - 90 / 100 is 0.09999999999999998.
    model = nn.Sequential(nn.Conv2d(1, 10, 1), nn.Conv2d(10, 9, 1)).eval()
    example = torch.zeros(1, 1, 4, 4)
    graph, macs = PruningGraph(model, example), count_macs(model, example)
    for target, filters in ((0.1, 1), (0.2, 2), (0.3, 3), (0.35, 4)):
        config = LaaspConfig(flops_reduction=target, step=0.6)
        assert counts_of(graph, macs, measure_baseline(graph, macs, config), config)["0"] == filters
        gone = {"FLOPs": 1 - macs_after(macs, graph.step("0", range(filters))) / macs.total}
        assert config.is_reached(gone, 1) and not config.is_reached({"FLOPs": gone["FLOPs"] - 0.1}, 1)


def test_it_is_on_by_default():
    assert dataclasses.replace(LaaspConfig(flops_reduction=0.5)).exact_target is True
