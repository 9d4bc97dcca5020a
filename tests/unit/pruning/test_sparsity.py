"""Masks of group sparsity, written out by hand."""

import pytest
import torch
from torch import nn

from laasp_ray.errors import PruningError
from laasp_ray.pruning.sparsity import groups as sparsity
from laasp_ray.pruning.sparsity.groups import (
    GroupRule,
    group_counts,
    group_mask,
    masked,
    pack_mask,
    satisfies,
    sort_layers,
    unpack_mask,
)

TWO_OF_FOUR = GroupRule(4, 2)


def mask_of(row, rule, **options):
    """The mask of a linear layer of one output, as 0s and 1s."""
    return group_mask(torch.tensor([row]), rule, **options).int().tolist()[0]


def test_the_smallest_magnitudes_of_every_group_go():
    # The magnitudes are (3, 1, 2, 4) and (5, 8, 6, 7).
    assert mask_of([-3.0, 1.0, 2.0, -4.0, 5.0, -8.0, 6.0, 7.0], TWO_OF_FOUR) == [1, 0, 0, 1, 0, 1, 0, 1]


def test_of_equal_magnitudes_the_higher_index_stays():
    assert mask_of([1.0, -1.0, 1.0, -1.0], TWO_OF_FOUR) == [0, 0, 1, 1]
    assert mask_of([0.0] * 8, GroupRule(8, 6)) == [0, 0, 0, 0, 0, 0, 1, 1]
    assert mask_of([2.0, 1.0, 1.0, 1.0], TWO_OF_FOUR) == [1, 0, 0, 1]


def test_a_short_last_group_keeps_the_same_share_rounded_up():
    # Of 8 with 6 pruned: 5 inputs keep ceil(5 x 2 / 8) = 2, 4 keep 1, one keeps 1.
    assert [GroupRule(8, 6).kept_of(size) for size in (8, 5, 4, 1)] == [2, 2, 1, 1]
    row = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 1.0, 5.0, 2.0, 4.0, 3.0]
    assert mask_of(row, GroupRule(8, 6)) == [0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("shape", [(4, 8, 3, 3), (4, 13, 1, 1), (5, 6), (2, 3, 5, 5), (3, 24)])
def test_how_many_weights_stay_follows_from_the_shape(shape):
    for rule in (GroupRule(8, 6), GroupRule(8, 3), GroupRule(4, 1)):
        assert rule.kept_in(shape) == int(group_mask(torch.ones(shape), rule).sum())
    assert GroupRule(8, 6).kept_in((4, 13, 3, 3)) == 4 * 9 * (2 + 2)  # of 8 two, of 5 two


def test_a_convolution_groups_its_input_channels_at_each_kernel_position():
    # One filter of 4 channels and a kernel of 1 x 2: magnitudes rise with the channel at the left, fall at the right.
    weight = torch.tensor([[[[1.0, 4.0]], [[2.0, 3.0]], [[3.0, 2.0]], [[4.0, 1.0]]]])
    wanted = torch.tensor([[[[0, 1]], [[0, 1]], [[1, 0]], [[1, 0]]]], dtype=torch.bool)
    assert torch.equal(group_mask(weight, TWO_OF_FOUR), wanted)


def test_a_grouped_convolution_groups_inside_each_groups_own_inputs():
    layer = nn.Conv2d(8, 2, 1, groups=2)
    layer.weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])[..., None, None]
    assert sort_layers(nn.Sequential(layer), 4).convolutions == ("0",)
    assert sort_layers(nn.Sequential(layer), 8).dense == {"0": "4 inputs a filter, fewer than the group of 8"}
    assert group_mask(layer.weight, TWO_OF_FOUR).flatten(1).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_what_was_pruned_before_goes_first_even_if_a_kept_weight_has_become_zero():
    held = torch.tensor([[False, True, True, True]])
    assert mask_of([0.0, 0.0, 1.0, 2.0], GroupRule(4, 1), earlier=held) == [0, 1, 1, 1]
    held = torch.tensor([[True, True, True, False]])
    assert mask_of([0.0, 5.0, 1.0, 0.0], GroupRule(4, 1), earlier=held) == [1, 1, 1, 0]
    assert mask_of([0.0, 5.0, 1.0, 0.0], TWO_OF_FOUR, earlier=held) == [0, 1, 1, 0]


def test_a_mask_made_in_parts_is_the_same(monkeypatch):
    weight = torch.randn(7, 20, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = group_mask(weight, GroupRule(8, 6))
    monkeypatch.setattr(sparsity, "_CHUNK", 50)
    assert torch.equal(group_mask(weight, GroupRule(8, 6)), whole)
    # Twenty inputs are groups of 8, 8 and 4, which keep 2, 2 and 1.
    assert (whole.sum(1) == 5).all()


def test_counts_of_groups():
    mask = torch.tensor([[1, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    assert group_counts(mask, 4).tolist() == [[1, 2], [4, 0]]
    assert group_counts(mask[:, :, None, None].expand(2, 6, 1, 2), 4).tolist() == [[1, 2, 1, 2], [4, 0, 4, 0]]


@pytest.mark.parametrize("shape", [(16, 32), (8, 16, 3, 3)])
def test_six_of_eight_always_is_two_of_four_and_twelve_of_sixteen_need_not_be(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert satisfies(weight * group_mask(weight, GroupRule(8, 6)), TWO_OF_FOUR)
    assert not satisfies(weight, TWO_OF_FOUR)
    # The four largest of sixteen may be neighbours.
    row = torch.cat([torch.arange(4) + 2.0, torch.ones(12)])[None]
    twelve = row * group_mask(row, GroupRule(16, 12))
    assert satisfies(twelve, GroupRule(16, 12))
    assert not satisfies(twelve, TWO_OF_FOUR)


def test_a_short_last_group_is_checked_against_its_own_share():
    assert satisfies(torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 0.0]]), TWO_OF_FOUR)
    assert not satisfies(torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]]), TWO_OF_FOUR)


def test_which_layers_stay_dense_and_why():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.ConvTranspose2d(16, 16, 3),
        nn.Conv2d(16, 8, 1),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.Linear(8, 8),
        nn.Linear(8, 8),
    )
    layers = sort_layers(model, 8, ignored=("6",))
    assert (layers.convolutions, layers.linear) == (("3",), ("5",))
    assert layers.dense == {
        "0": "3 inputs a filter, fewer than the group of 8",
        "1": "depthwise",
        "2": "transposed convolution",
        "4": "its weight is no plain parameter",
        "6": "named in prune.ignored",
    }
    for entry in ("0.", "0"):  # a module's name stands for all below it, as it does where filters are removed
        assert sort_layers(nn.Sequential(model), 8, ignored=(entry,)).convolutions == ()


def test_masks_are_packed_a_bit_a_weight_and_come_back():
    mask = torch.rand(3, 5, 1, 3, generator=torch.Generator().manual_seed(2)) < 0.5
    packed = pack_mask(mask)
    assert len(packed) == 6  # 45 bits
    assert torch.equal(unpack_mask(packed, mask.shape), mask)
    with pytest.raises(PruningError, match=r"6 bytes does not belong to a weight of shape \(3, 5\); it would have 2"):
        unpack_mask(packed, (3, 5))


def test_masking_sets_plain_zeros_and_leaves_the_rest():
    tensors = {"a": torch.tensor([[-1.0, 2.0]]), "b": torch.tensor([3.0])}
    result = masked(tensors, {"a": pack_mask(torch.tensor([[False, True]]))})
    assert torch.equal(result["a"], torch.tensor([[0.0, 2.0]]))
    assert not torch.signbit(result["a"]).any()
    assert result["b"] is tensors["b"]
    with pytest.raises(PruningError, match="a mask for c"):
        masked(tensors, {"c": b""})


def test_a_rule_that_leaves_nothing_is_refused():
    with pytest.raises(PruningError, match="4 of every 4 cannot be pruned"):
        GroupRule(4, 4)
