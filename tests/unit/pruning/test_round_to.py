"""Layers left with a multiple of some number of filters, and parameters counted, by hand."""

import math

import pytest
import torch
from torch import nn

from laasp_ray.cost.macs import count_macs
from laasp_ray.pruning.graph import ChannelGroup, PruningGraph, filters_to_remove, reachable, reachable_parameters
from laasp_ray.pruning.plan import Plan, apply_plan, parameters_after

INPUT = torch.zeros(1, 2, 1, 1)


def chain():
    """MACs 16 + 32 + 24 + 3 = 75; parameters, with biases, 24 + 40 + 27 + 4 = 95; the second layer has 2 groups."""
    return nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 1, 1))


def count(filters, original, step_size, round_to, blocks=1, *, limit=0.75, rule="flops_share", step=0.1):
    group = ChannelGroup("layer", filters, blocks, ("layer",))
    return filters_to_remove(
        group,
        step_size=step_size,
        original=original,
        step_rule=rule,
        step=step,
        max_pruned=limit,
        round_to=round_to,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((64, 64, 6, 8), 8),  # 56 are nearest to 58
        ((64, 64, 1, 8), 8),  # at least one goes
        ((64, 64, 12, 8), 8),  # 8 and 16 are equally near: the smaller
        ((64, 64, 13, 8), 16),
        ((20, 20, 8, 8), 4),  # 16 or 8 may stay, equally near
        ((20, 20, 9, 8), 12),
        ((24, 64, 8, 8), 8),  # 48 of 64 may go, 40 are gone
        ((24, 64, 20, 8), 8),
        ((16, 64, 8, 8), 0),  # all that may go is gone
        ((8, 8, 2, 8), 0),  # nothing stays
        ((12, 16, 3, 8), 4),
        ((11, 16, 3, 8), 3),
        ((10, 12, 3, 8), 2),
        ((16, 16, 4, 8, 4), 8),
        ((24, 24, 4, 6, 4), 12),  # 4 blocks and multiples of 6: 12 stay
        ((24, 24, 4, 9, 4), 0),
    ],
)
def test_the_nearest_count_that_leaves_a_multiple(arguments, expected):
    assert count(*arguments) == expected


def test_a_share_of_the_layer_is_rounded_too():
    assert count(64, 64, 1, 8, rule="layer_share") == 8  # 6.4
    assert count(64, 64, 1, 8, rule="layer_share", step=0.2) == 16  # 12.8, rounded to 13
    assert count(64, 64, 1, 8, rule="layer_share", step=0.2, limit=0.2) == 8  # 12 may go


def test_one_changes_nothing():
    for original in (8, 12, 24):
        for blocks in (1, 2, 4):
            for filters in range(blocks, original + 1, blocks):
                for step_size in range(12):
                    for limit in (0.3, 0.75, 0.99):
                        most = math.floor(limit * original + 1e-9) - (original - filters)
                        before = max(0, min(step_size, most, filters - blocks) // blocks * blocks)
                        assert count(filters, original, step_size, 1, blocks, limit=limit) == before


def test_reachable_by_hand():
    graph, macs = PruningGraph(chain(), INPUT), count_macs(chain(), INPUT)
    # 75% off leaves 2, 2 and 1. MACs 2*2 + 2*2/2 + 2*1 + 1; parameters (4 + 2) + (2 + 2) + (2 + 1) + (1 + 1)
    assert reachable_parameters(graph, max_pruned=0.75) == pytest.approx(1 - 15 / 95)
    # Multiples of 4: 4, 4, and all 3, for 4 there are not. MACs 2*4 + 4*4/2 + 4*3 + 3; parameters 12 + 12 + 15 + 4
    assert reachable(graph, macs, max_pruned=0.75, round_to=4) == pytest.approx(1 - 31 / 75)
    assert reachable_parameters(graph, max_pruned=0.75, round_to=4) == pytest.approx(1 - 43 / 95)
    # Multiples of 3 in 2 blocks: 6, 6 and 3. MACs 2*6 + 6*6/2 + 6*3 + 3
    assert reachable(graph, macs, max_pruned=0.75, round_to=3) == pytest.approx(1 - 51 / 75)
    assert reachable(graph, macs, max_pruned=0.75, round_to=16) == 0
    # One layer of them: 8*2 + 8*8/2 are left as they are
    assert reachable(graph, macs, max_pruned=0.75, layers=["2"]) == pytest.approx(1 - (16 + 32 + 8 + 1) / 75)
    assert reachable_parameters(graph, max_pruned=0.75, layers=["2"]) == pytest.approx(1 - (24 + 40 + 9 + 2) / 95)


@pytest.mark.parametrize(
    ("layer", "filters", "left"),
    [
        ("0", (0, 4), 95 - (2 * 2 + 2) - 8),  # each of 8 filters behind loses an input
        ("1", (1, 7), 95 - (2 * 4 + 2) - 2 * 3),
        ("2", (1,), 95 - (8 + 1) - 1),
    ],
)
def test_parameters_after_a_prune_are_those_of_the_pruned_network(layer, filters, left):
    model = chain()
    graph = PruningGraph(model, INPUT)
    step = graph.step(layer, filters)
    assert parameters_after(graph.shapes, Plan.empty()) == 95
    assert parameters_after(graph.shapes, step) == left
    apply_plan(model, step)
    assert sum(parameter.numel() for parameter in model.parameters()) == left


def test_buffers_are_no_parameters():
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    graph = PruningGraph(model, INPUT)
    assert parameters_after(graph.shapes, Plan.empty()) == 8 + 8 + 5
    assert parameters_after(graph.shapes, graph.step("0", (2,))) == 6 + 6 + 4
