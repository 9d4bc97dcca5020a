import logging

import pytest
import torch
from pruning_reference import pruned_copy, randomise
from torch import nn
from torch.nn import functional as F

from laasp_ray.errors import ConfigError, PruningError
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.plan import Plan


class Grouped(nn.Module):
    """first (8) -> grouped (8 inputs, 6 outputs, 2 groups), beside `other` (4), concatenated, flattened at 2x2."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 6, 1, groups=2)
        self.norm = nn.BatchNorm2d(10)
        self.other = nn.Conv2d(3, 4, 1, bias=False)
        self.hidden = nn.Linear(40, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        left = self.grouped(F.relu(self.first(x)))
        both = F.relu(self.norm(torch.cat([left, self.other(x)], 1)))
        return self.last(F.relu(self.hidden(torch.flatten(both, 1))))


INPUT = torch.zeros(1, 3, 2, 2)


def columns(channels):
    return tuple(4 * channel + place for channel in channels for place in range(4))


def norm(kept):
    return {f"norm.{leaf}": {0: (kept,)} for leaf in ("weight", "bias", "running_mean", "running_var")}


def test_inputs_of_a_grouped_convolution_by_hand():
    graph = PruningGraph(Grouped(), INPUT)
    assert graph.layers["first"].blocks == 2
    assert graph.layers["first"].coupled == ("first", "grouped")
    plan = graph.step("first", [1, 2, 4, 7])
    kept = (0, 3, 5, 6)
    assert plan == Plan(
        tensors={"first.weight": {0: (kept,)}, "first.bias": {0: (kept,)}, "grouped.weight": {1: ((0, 3), (1, 2))}},
        attributes={"first": {"out_channels": 4}, "grouped": {"in_channels": 4}},
        layers={"first": kept},
    )


def test_outputs_of_a_grouped_convolution_concatenated_and_flattened_by_hand():
    graph = PruningGraph(Grouped(), INPUT)
    kept, both = (0, 2, 3, 4), (0, 2, 3, 4, 6, 7, 8, 9)  # filter 1 of the first group, 5 of the second go
    assert graph.step("grouped", [5, 1]) == Plan(
        tensors={
            "grouped.weight": {0: (kept,)},
            "grouped.bias": {0: (kept,)},
            **norm(both),
            "hidden.weight": {1: (columns(both),)},
        },
        attributes={"grouped": {"out_channels": 4}, "norm": {"num_features": 8}, "hidden": {"in_features": 32}},
        layers={"grouped": kept},
    )
    kept, both = (0, 1, 3), (0, 1, 2, 3, 4, 5, 6, 7, 9)
    assert graph.step("other", [2]) == Plan(
        tensors={"other.weight": {0: (kept,)}, **norm(both), "hidden.weight": {1: (columns(both),)}},
        attributes={"other": {"out_channels": 3}, "norm": {"num_features": 9}, "hidden": {"in_features": 36}},
        layers={"other": kept},
    )


def test_each_group_computes_with_its_own_inputs():
    model = randomise(Grouped())
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    pruned = pruned_copy(model, PruningGraph(model, INPUT).step("first", [1, 2, 4, 7]))
    with torch.no_grad():
        model.first.weight[[1, 2, 4, 7]] = 0
        model.first.bias[[1, 2, 4, 7]] = 0
        torch.testing.assert_close(pruned(x), model(x))


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ([0], "each of its 2 blocks of 4 must lose the same count"),
        ([0, 1], r"not \[0, 2\]"),
        ([0, 8], r"filters \[8\].*from 0 to 7"),
        ([-1, 5], r"filters \[-1\]"),
        ([1, 1, 5, 6], "must be different"),
        (list(range(8)), "all 8 filters"),
    ],
)
def test_filters_that_cannot_go(filters, message):
    with pytest.raises(PruningError, match=message):
        PruningGraph(Grouped(), INPUT).step("first", filters)


def test_no_such_layer():
    with pytest.raises(PruningError, match="layer 'hidden' cannot be pruned: no such candidate"):
        PruningGraph(Grouped(), INPUT).step("hidden", [0])


def test_linear_layers_are_candidates_when_named():
    graph = PruningGraph(Grouped(), INPUT, extra_layers=["hidden", "last"])
    assert list(graph.layers) == ["first", "grouped", "other", "hidden"]
    assert graph.skipped == {"last": "its filters are outputs of the network"}
    kept = (0, 1, 2, 4)
    assert graph.step("hidden", [3]) == Plan(
        tensors={"hidden.weight": {0: (kept,)}, "hidden.bias": {0: (kept,)}, "last.weight": {1: (kept,)}},
        attributes={"hidden": {"out_features": 4}, "last": {"in_features": 4}},
        layers={"hidden": kept},
    )
    with pytest.raises(ConfigError, match="'hiden', which is no linear layer of the network; did you mean hidden"):
        PruningGraph(Grouped(), INPUT, extra_layers=["hiden"])
    with pytest.raises(ConfigError, match="'first', which is no linear layer"):
        PruningGraph(Grouped(), INPUT, extra_layers=["first"])


def test_ignored_layers_keep_their_own_filters_but_may_lose_inputs(caplog):
    with caplog.at_level(logging.DEBUG, logger="laasp_ray.pruning.graph"):
        graph = PruningGraph(Grouped(), INPUT, ignored=["grouped"])
    assert graph.skipped == {"grouped": "is ignored"}
    assert "layer grouped is not pruned: is ignored" in caplog.text
    assert "grouped" in graph.layers["first"].coupled
    assert PruningGraph(Grouped(), INPUT, ignored=["norm"]).skipped == dict.fromkeys(
        ("grouped", "other"), "is coupled to norm, which is ignored"
    )
    with pytest.raises(ConfigError, match="'gruoped', which is no module of the network; did you mean grouped"):
        PruningGraph(Grouped(), INPUT, ignored=["gruoped"])
    for nothing in ("", "group"):
        with pytest.raises(ConfigError, match="no module of the network"):
            PruningGraph(Grouped(), INPUT, ignored=[nothing])


def test_prefixes_ignore_all_below():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    for entry in ("0.", "0"):
        graph = PruningGraph(model, INPUT, ignored=[entry])
        assert list(graph.layers) == ["1"]
        assert graph.skipped == {
            "0.0": "is ignored",
            "0.1": "is ignored",
            "2": "its filters are outputs of the network",
        }


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(x + self.inner(x)).mean((2, 3))


def test_a_layer_coupled_to_an_ignored_one_is_skipped():
    assert PruningGraph(Residual(), INPUT).layers["inner"].coupled == ("stem", "inner", "last")
    assert PruningGraph(Residual(), INPUT, ignored=["inner"]).skipped == {
        "stem": "is coupled to inner, which is ignored",
        "inner": "is ignored",
        "last": "its filters are outputs of the network",
    }


def test_depthwise_loses_groups():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 2, 1))
    plan = PruningGraph(model, INPUT).step("1", [2])
    kept = (0, 1, 3)
    assert plan.tensors == {
        "1.weight": {0: (kept,)},
        "1.bias": {0: (kept,)},
        "0.weight": {0: (kept,)},
        "0.bias": {0: (kept,)},
        "2.weight": {1: (kept,)},
    }
    assert plan.attributes["1"] == {"out_channels": 3, "in_channels": 3, "groups": 3}
    assert plan.layers == {"0": kept, "1": kept}


def test_depthwise_with_two_filters_for_each_channel_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv2d(8, 2, 1))
    plan = PruningGraph(model, INPUT).step("0", [1])
    kept, both = (0, 2, 3), (0, 1, 4, 5, 6, 7)
    assert plan.tensors == {
        "0.weight": {0: (kept,)},
        "0.bias": {0: (kept,)},
        "1.weight": {0: (both,)},
        "1.bias": {0: (both,)},
        "2.weight": {1: (both,)},
    }
    assert plan.attributes["1"] == {"out_channels": 6, "in_channels": 3, "groups": 3}
    assert plan.layers == {"0": kept, "1": both}


def test_transposed_convolutions_by_hand():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 2, 1))
    graph = PruningGraph(model, INPUT)
    plan = graph.step("0", [0, 3])
    assert plan.tensors == {"0.weight": {1: ((1, 2),)}, "0.bias": {0: ((1, 2),)}, "1.weight": {0: ((1, 2),)}}
    plan = graph.step("1", [0, 5])
    kept = (1, 2, 3, 4)
    assert plan.tensors == {"1.weight": {1: ((1, 2), (0, 1))}, "1.bias": {0: (kept,)}, "2.weight": {1: (kept,)}}
    x = torch.randn(1, 3, 2, 2)
    reference = pruned_copy(model, Plan())
    with torch.no_grad():
        reference[2].weight[:, [0, 5]] = 0
        torch.testing.assert_close(pruned_copy(model, plan)(x), reference(x))


def test_other_modules_with_channels():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.GroupNorm(4, 8),
        nn.PReLU(8),
        nn.InstanceNorm2d(8, affine=True),
        nn.PReLU(),
        nn.BatchNorm2d(8, affine=False),
        nn.Conv2d(8, 2, 1),
    )
    example = torch.randn(1, 3, 4, 4)
    graph = PruningGraph(model, example)
    assert graph.layers["0"].blocks == 4
    plan = graph.step("0", [0, 3, 5, 6])
    kept = (1, 2, 4, 7)
    assert plan.attributes == {
        "0": {"out_channels": 4},
        "1": {"num_channels": 4},
        "2": {"num_parameters": 4},
        "3": {"num_features": 4},
        "5": {"num_features": 4},
        "6": {"in_channels": 4},
    }
    assert set(plan.tensors) == {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "2.weight",
        "3.weight",
        "3.bias",
        "5.running_mean",
        "5.running_var",
        "6.weight",
    }
    assert all(axes in ({0: (kept,)}, {1: (kept,)}) for axes in plan.tensors.values())
    assert pruned_copy(model, plan)(example).shape == (1, 2, 4, 4)


def test_one_dimension_and_three():
    one = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Conv1d(3, 2, 1))
    assert PruningGraph(one, torch.randn(1, 2, 5)).step("0", [1]).layers == {"0": (0, 2)}
    three = nn.Sequential(nn.Conv3d(2, 3, 1), nn.BatchNorm3d(3), nn.Conv3d(3, 2, 1))
    assert PruningGraph(three, torch.randn(1, 2, 3, 3, 3)).step("0", [1]).layers == {"0": (0, 2)}


class Shuffled(nn.Module):
    """The order of channels between the layers is changed by reshaping, in two groups."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.first(x)
        images, channels, height, width = x.shape
        x = x.view(images, 2, channels // 2, height, width).transpose(1, 2).reshape(images, channels, height, width)
        return self.third(self.second(x)).mean((2, 3))


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        left, right = self.first(x).split(4, 1)
        return self.third(self.second(left) + right)


class Fixed(nn.Module):
    """The number of channels is written into the forward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.third(self.second(self.first(x).reshape(-1, 8, 2, 2))).mean((2, 3))


class Doubled(nn.Module):
    """first is added to a concatenation of small with itself: its filters i and i + 3 belong together."""

    def __init__(self):
        super().__init__()
        self.small, self.first, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        small = self.small(x)
        return self.last(self.first(x) + torch.cat([small, small], 1)).mean((2, 3))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return {"features": self.last(self.used(x))}


@pytest.mark.parametrize(
    ("network", "layer", "reason"),
    [
        (Halved, "first", "does not run without them"),
        (Shuffled, "first", "coupled to one another"),
        (Fixed, "first", "does not run without them"),
        (Doubled, "first", "coupled to one another"),
        (Unused, "unused", "not part of the forward pass"),
        (Unused, "last", "one filter left"),
    ],
)
def test_layers_that_cannot_be_pruned_say_why(network, layer, reason):
    torch.manual_seed(0)
    graph = PruningGraph(network(), INPUT)
    assert reason in graph.skipped[layer]
    assert layer not in graph.layers
    with pytest.raises(PruningError, match=f"layer '{layer}' cannot be pruned: .*{reason}"):
        graph.step(layer, [0])


def test_a_fault_costs_only_the_layers_it_concerns():
    torch.manual_seed(0)
    assert list(PruningGraph(Fixed(), INPUT).layers) == ["second"]


def test_a_shuffle_couples_the_channels_that_it_interleaves():
    """0 4 1 5 2 6 3 7 of two groups of four: without 0 and 5 it would be 1 4 2 6 3 7, not 4 1 2 6 3 7."""
    torch.manual_seed(0)
    graph = PruningGraph(Shuffled(), INPUT)
    assert list(graph.layers) == ["second"]


@pytest.mark.parametrize(
    ("model", "layer", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 1)), "0", "one filter left"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=4), nn.Conv2d(8, 2, 1)),
            "1",
            "coupled to one another",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 1, groups=3), nn.Conv2d(6, 2, 1)),
            "0",
            "one filter left in each of its 6 blocks",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.Conv2d(12, 6, 1, groups=6), nn.Conv2d(6, 2, 1)),
            "0",
            "one filter left in each of its 12 blocks",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm([4, 2, 2]), nn.Conv2d(4, 2, 1)),
            "0",
            "1 normalises over 3 dimensions at once",
        ),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.Conv2d(4, 2, 1)),
            "0",
            "computed by a parametrisation",
        ),
    ],
)
def test_skipped_layers(model, layer, reason):
    assert reason in PruningGraph(model, INPUT).skipped[layer]


def test_grouped_convolutions_with_one_filter_a_group_are_not_taken_for_depthwise():
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1, groups=4), nn.Conv2d(4, 2, 1))
    graph = PruningGraph(model, INPUT)
    assert graph.skipped["1"] == "one filter left in each of its 4 blocks"
    assert graph.step("0", [0, 4, 8, 9]).tensors["1.weight"] == {1: ((1, 2), (0, 2), (0, 1), (1, 2))}


def test_the_network_is_left_alone():
    model = Grouped().train()
    model.norm.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.first.weight.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = [id(parameter) for parameter in model.parameters()]
    with torch.inference_mode():
        graph = PruningGraph(model, INPUT)
    assert list(graph.layers) == ["first", "grouped", "other"]
    assert model.training
    assert not model.norm.training
    assert [id(parameter) for parameter in model.parameters()] == objects
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["first.weight"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert (model.grouped.groups, model.grouped.in_channels) == (2, 8)


def test_networks_that_cannot_be_traced():
    with pytest.raises(PruningError, match=r"cannot be traced with an input of shape \(1, 4, 2, 2\)"):
        PruningGraph(Grouped(), torch.zeros(1, 4, 2, 2))


def test_half_precision_and_batches_of_inputs():
    assert list(PruningGraph(Grouped().half(), torch.zeros(5, 3, 2, 2).half()).layers) == ["first", "grouped", "other"]
