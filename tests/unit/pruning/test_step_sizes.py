import pytest
import torch
from torch import nn

from laasp_ray.cost.macs import count_macs
from laasp_ray.pruning.graph import ChannelGroup, PruningGraph, filters_to_remove, reachable, step_sizes

INPUT = torch.zeros(1, 2, 1, 1)


def chain():
    """MACs 2*8 + 8*8/2 + 8*3 + 3*1 = 75 at one place; the second layer has 2 groups."""
    return nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 1, 1))


def test_shares_by_hand():
    graph, macs = PruningGraph(chain(), INPUT), count_macs(chain(), INPUT)
    assert macs.total == 75
    # "0": two filters, one a group: 2*2 + 2*4 = 12 of 75. "1": 2*4 + 2*3 = 14. "2": 8 + 1 = 9.
    assert step_sizes(graph, macs, step=0.30, step_rule="flops_share") == {"0": 4, "1": 4, "2": 3}
    # 0.24 / 0.16 = 1.5, rounded up; 0.24 / 0.18667 = 1.29; 0.24 / 0.12 = 2
    assert step_sizes(graph, macs, step=0.24, step_rule="flops_share") == {"0": 4, "1": 2, "2": 2}
    assert step_sizes(graph, macs, step=0.0001, step_rule="flops_share") == {"0": 2, "1": 2, "2": 1}
    assert step_sizes(graph, macs, step=0.5, step_rule="layer_share") == {"0": 4, "1": 4, "2": 2}


def test_reachable_by_hand():
    graph, macs = PruningGraph(chain(), INPUT), count_macs(chain(), INPUT)
    # 75% off: 2, 2 and 1 are left (2 of 3 may go), 2*2 + 2*2/2 + 2*1 + 1*1 = 9
    assert reachable(graph, macs, max_pruned=0.75) == pytest.approx(1 - 9 / 75)
    # 40%: 3 of 8 may go, so one a group; 1 of 3. 2*6 + 6*6/2 + 6*2 + 2*1 = 44
    assert reachable(graph, macs, max_pruned=0.4) == pytest.approx(1 - 44 / 75)
    assert reachable(graph, macs, max_pruned=0.2) == 0


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.last = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(x + self.inner(x))


def test_reachable_counts_coupled_filters_once():
    graph, macs = PruningGraph(Residual(), INPUT), count_macs(Residual(), INPUT)
    assert reachable(graph, macs, max_pruned=0.5) == pytest.approx(1 - (4 + 4 + 2) / (8 + 16 + 4))


def count(filters, original, step_size, blocks=1, *, limit=0.75, rule="flops_share", step=0.1):
    group = ChannelGroup("layer", filters, blocks, ("layer",))
    return filters_to_remove(group, step_size=step_size, original=original, step_rule=rule, step=step, max_pruned=limit)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((16, 16, 3), 3),
        ((6, 16, 3), 2),  # 12 of 16 may go, 10 are gone
        ((4, 16, 3), 0),
        ((3, 16, 3), 0),  # beyond the limit by coupling
        ((16, 16, 6, 4), 4),  # one from each block, not one and a half
        ((8, 16, 8, 4), 4),  # the limit leaves 4
        ((7, 10, 9), 4),  # floor(7.5) - 3
    ],
)
def test_count_for_a_iteration(arguments, expected):
    assert count(*arguments) == expected


def test_count_at_high_limits_leaves_one_filter_in_each_block():
    assert count(8, 8, 8, limit=0.99) == 7
    assert count(8, 8, 8, 2, limit=0.99) == 6
    assert count(2, 200, 1, 2, limit=0.99) == 0


def test_limit_is_not_lost_to_rounding():
    assert 0.29 * 100 < 29
    assert count(100, 100, 100, limit=0.29) == 29


def test_share_of_the_current_filters():
    assert count(64, 64, 1, rule="layer_share") == 6
    assert count(45, 64, 1, rule="layer_share") == 5  # 4.5, rounded up
    assert count(4, 4, 1, rule="layer_share") == 1
    assert count(32, 32, 1, 4, rule="layer_share", step=0.25) == 8
    assert count(17, 64, 1, rule="layer_share") == 1  # of 1.7 only 1 is within the limit
