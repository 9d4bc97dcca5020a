"""Density and the simulated accelerator's utilisation, worked out by hand."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from laasp_ray.errors import StoreError
from laasp_ray.methods.sparsity_report import measure_sparsity, sparsity_from_json, sparsity_to_json, utilisation
from laasp_ray.pruning.sparsity.groups import GroupRule, group_counts, group_mask, pack_mask
from laasp_ray.report.sparsity import sparsity_table


def test_lanes_wait_for_the_slowest():
    # Two multipliers a lane. Step 1: max(1, ceil(2 / 2)) and max(1, 0), 1 cycle. Step 2: 2 and 1, 2 cycles.
    counts = np.array([[2, 4], [0, 1]])
    assert utilisation(counts, 2) == pytest.approx(7 / (2 * 2 * 3))
    # Alone, the first lane takes 1 + 2 cycles, the second 1 + 1: of 6 and 4 slots 6 and 1 are used.
    assert utilisation(counts, 2, lanes=1) == pytest.approx(7 / 10)


def test_channels_of_different_groups_do_not_share_lanes():
    counts = np.array([[2], [2], [6], [6]])
    assert utilisation(counts, 2, groups=2) == 1  # one cycle for the first two, three for the others
    assert utilisation(counts, 2) == pytest.approx(16 / (3 * 4 * 2))


def test_exactly_p_of_every_g_keeps_every_multiplier_busy_but_in_short_groups():
    weight = torch.randn(32, 12, 1, 1, generator=torch.Generator().manual_seed(0))
    whole = group_mask(weight[:, :8], GroupRule(8, 6))
    assert utilisation(group_counts(whole, 8), 2) == 1
    # Twelve inputs: groups of 8 and 4, which keep 2 and 1 of two multipliers.
    assert utilisation(group_counts(group_mask(weight, GroupRule(8, 6)), 8), 2) == pytest.approx(3 / 4)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, groups=2), nn.Flatten(), nn.Linear(64, 10))


def rows_of(model, seed=0):
    rules = {"1": GroupRule(8, 6), "3": GroupRule(8, 4)}
    masks = {
        f"{name}.weight": pack_mask(group_mask(model.get_submodule(name).weight, rule)) for name, rule in rules.items()
    }
    return measure_sparsity(model, rules, {"0": "too few"}, masks, {"0": 192, "1": 18432, "3": 640}, seed=seed)


def test_a_row_for_each_layer():
    first, second, third = rows_of(network())
    assert (first.layer, first.weights, first.kept, first.reason) == ("0", 192, 192, "too few")
    assert first.group is first.prune is first.utilisation is first.utilisation_unstructured is None
    assert (second.weights, second.kept, second.density, second.utilisation) == (18432, 4608, 0.25, 1)
    assert (third.weights, third.kept, third.group, third.prune, third.density) == (640, 320, 8, 4, 0.5)


def test_unstructured_pruning_of_the_same_density_leaves_multipliers_idle():
    """The expected cycles of a step are the mean of the largest of 16 binomial counts, here summed exactly."""
    row = rows_of(network())[1]
    probabilities = [0.25**k * 0.75 ** (8 - k) * c for k, c in enumerate((1, 8, 28, 56, 70, 56, 28, 8, 1))]
    below = np.cumsum(probabilities)
    # At most 2, 4, 6, 8 non-zero weights take 1, 2, 3, 4 cycles; the slowest of 16 lanes counts.
    at_most = [below[k] ** 16 for k in (2, 4, 6, 8)]
    cycles = at_most[0] + sum(n * (at_most[n - 1] - at_most[n - 2]) for n in (2, 3, 4))
    assert row.utilisation_unstructured == pytest.approx(2 / (2 * cycles), rel=0.05)
    assert row.utilisation_unstructured < 0.5


def test_the_simulation_depends_on_the_seed_alone():
    shares = [rows_of(network(), seed)[1].utilisation_unstructured for seed in (0, 0, 1)]
    assert shares[0] == shares[1] != shares[2]


def test_the_report_goes_to_json_and_back_and_reads_as_a_table():
    rows = rows_of(network())
    stored = json.loads(json.dumps(sparsity_to_json(rows)))
    assert stored["layers"][1]["density"] == 0.25
    assert sparsity_from_json(stored) == rows
    with pytest.raises(StoreError, match="not a report of sparsity"):
        sparsity_from_json({"layers": [{"layer": "0"}]})
    table = sparsity_table(rows).splitlines()
    assert table[1].split() == ["0", "192", "100.00%", "-", "-", "-", "too", "few"]
    assert table[2].split()[:5] == ["1", "18,432", "25.00%", "8/6", "100.0%"]
    # 192 + 18,432 / 4 + 640 / 2 weights of 19,264; each is multiplied once here.
    assert table[4].split() == ["all", "layers", "19,264", "26.58%"]
    assert "5,120 of 19,264" in table[5]
