"""Compensation: exact where lost inputs are a function of the others, least squares elsewhere, and carried by plans."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from laasp_ray.errors import PruningError, SearchError
from laasp_ray.pruning import readers as readers_module
from laasp_ray.pruning.compensation import apply_compensated
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.moments import RIDGE, Gram, inverted
from laasp_ray.pruning.network import capture, rebuild
from laasp_ray.pruning.norms import norms_after
from laasp_ray.pruning.plan import Plan, apply_plan, parameters_after
from laasp_ray.pruning.readers import Reader, _that_fit
from laasp_ray.search.compensating import CompensationMemory, Measured
from laasp_ray.search.evaluate import CalibrationSet
from laasp_ray.search.grams import grams, grams_of, parts, patches


def compensator_of(model, images, mode="full"):
    model = model.eval()
    calibration = CalibrationSet(images, torch.zeros(len(images), dtype=torch.long), 4)
    return CompensationMemory().at(
        model,
        PruningGraph(model, images[:1]),
        mode,
        Measured(capture(model, Plan.empty())),
        lambda network, readers: grams(model, calibration, readers),
    )


def pruned_with(model, images, layer, filters, mode="full"):
    """The network without these filters, made up for, and the plan of that."""
    graph = PruningGraph(model.eval(), images[:1])
    compensator = compensator_of(model, images, mode)
    removal = graph.removal(layer, filters)
    pruned = rebuild(model, capture(model, Plan.empty())).eval()
    plan = apply_compensated(pruned, graph.step(layer, filters), compensator.made_up(removal), compensator.norms)
    return pruned, plan


def test_least_squares_by_hand():
    # Inputs (a, b): patches (1, 2), (3, 6), (5, 4). b = 2 + a * 0.5 is the best line: means 3 and 4, covariance
    # (4 + 0 + 0) / 3, variance 8 / 3. A reader with weights (10, 4) and without b has 10 + 4 * 0.5 and gains 4 * 2.5.
    patches_ = torch.tensor([[1.0, 2, 1], [3, 6, 1], [5, 4, 1]], dtype=torch.float64)
    moments = inverted(Gram((patches_.T @ patches_).unsqueeze(0)), "reader")
    compensation = moments.compensation(Reader("reader", 1, 2), [[1]])
    weight, gain = compensation.applied(torch.tensor([[10.0, 4.0]]))
    assert weight[0, 1] == 0
    assert float(weight[0, 0]) == pytest.approx(10 + 4 * 0.5, rel=2e-2)  # a ridge of 0.1% of the mean square
    assert float(gain[0]) == pytest.approx(4 * 2.5, rel=2e-2)


def test_inverse_without_inputs_is_that_of_the_others():
    draw = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones = torch.cat([draw, torch.ones(50, 1, dtype=torch.float64)], 1)
    moments = inverted(Gram((ones.T @ ones).unsqueeze(0)), "reader")
    (found,) = moments.without([[1, 3]]).inverse
    kept = [0, 2, 4, 5]
    wanted = torch.linalg.inv(torch.linalg.inv(moments.inverse[0])[kept][:, kept])
    assert torch.allclose(found, wanted, atol=1e-10)


@pytest.mark.parametrize("lost", [[1, 4], [1], [4], [0, 1, 2, 3, 4, 5]])
def test_inputs_that_are_always_zero_are_what_they_are_without_that_shortcut(lost):
    draw = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw[:, [0, 4]] = 0
    ones = torch.cat([draw, torch.ones(50, 1, dtype=torch.float64)], 1)
    moments = inverted(Gram((ones.T @ ones).unsqueeze(0)), "reader")
    whole = ones.T @ ones / 50
    whole.diagonal()[:-1] += RIDGE * whole.diagonal()[:-1].mean()
    assert torch.allclose(moments.inverse[0], torch.linalg.inv(whole), rtol=1e-10, atol=1e-12)
    compensation = moments.compensation(Reader("reader", 1, 6), [lost])
    assert set(compensation.groups[0].explained.tolist()) == set(lost) - {0, 4}
    kept = [index for index in range(6) if index not in lost]
    weight = torch.randn(3, 6, dtype=torch.float64)
    found, gain = compensation.applied(weight)
    others = [*kept, 6]
    mix = torch.linalg.solve(whole[others][:, others], whole[others][:, lost])
    wanted = torch.zeros(3, 7, dtype=torch.float64)
    wanted[:, others] = weight[:, lost] @ mix.T
    wanted[:, kept] += weight[:, kept]
    assert torch.allclose(found, wanted[:, :-1], atol=1e-6) and torch.allclose(gain, wanted[:, -1], atol=1e-6)


def test_layers_with_more_inputs_than_patches_are_named_in_one_line(caplog):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5, 2)]
    with caplog.at_level("INFO"):
        compensator_of(nn.Sequential(*layers), torch.randn(2, 3, 5, 5))
    lines = [record.getMessage() for record in caplog.records if "patches" in record.getMessage()]
    # "1" reads 4 x 3 x 3 inputs at one place of two images, "3" 5 inputs of two images.
    assert len(lines) == 1
    assert lines[0].startswith(
        "2 of 2 layers have fewer patches of their inputs than inputs (1, 3), so that their ridge"
    )


def test_more_inputs_than_patches_raise_the_ridge_and_values_that_are_not_finite_are_refused(caplog):
    caplog.set_level("DEBUG", "laasp_ray.pruning.moments")  # commands set the level of the package
    ones = torch.ones(1, 4, dtype=torch.float64)
    inverted(Gram((ones.T @ ones).unsqueeze(0)), "head")
    assert "head has 3 inputs and 1 patches of them: the ridge is 0.01" in caplog.text
    with pytest.raises(SearchError, match="the inputs of head are not finite"):
        inverted(Gram(torch.full((1, 2, 2), torch.nan, dtype=torch.float64)), "head")


class Doubled(nn.Module):
    """A convolution whose last filter is twice its first, and what reads it."""

    def __init__(self, reader, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        with torch.no_grad():
            self.first.weight[3] = 2 * self.first.weight[0]
            self.first.bias[3] = 2 * self.first.bias[0] + 0.5
        self.reader = reader
        self.norm = nn.BatchNorm2d(reader.out_channels) if norm else nn.Identity()

    def forward(self, x):
        return self.norm(self.reader(self.first(x))).mean((2, 3))


def dilated_afterwards(**arguments):
    """As code does that dilates a network's last stage."""
    layer = nn.Conv2d(4, 6, 3, **arguments)
    layer.dilation = (2, 2)
    if layer.padding != "same":
        layer.padding = (2, 2)
    return layer


READERS = {
    "3x3": lambda: nn.Conv2d(4, 6, 3),
    "no bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "stride and dilation": lambda: nn.Conv2d(4, 6, (3, 2), stride=2, dilation=2, padding=(2, 0)),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "same": lambda: nn.Conv2d(4, 6, (4, 3), padding="same"),
    "1x1": lambda: nn.Conv2d(4, 6, 1),
    "dilated afterwards": lambda: dilated_afterwards(padding=1),
    "tuples of one": lambda: nn.Conv2d(4, 6, 3, padding=(1,), stride=(2,), dilation=(1,)),
    "same, dilated afterwards": lambda: dilated_afterwards(padding="same"),
}


@torch.no_grad()
@pytest.mark.parametrize("mode", ["full", "channels"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", [name for name in READERS if name != "circular"])
def test_a_filter_that_follows_from_another_is_not_missed(name, norm, mode):
    model = Doubled(READERS[name](), norm).eval()
    if norm:
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.running_var.uniform_(0.5, 2)
    images = torch.randn(16, 3, 9, 9)
    plain = rebuild(model, capture(model, Plan.empty())).eval()
    apply_plan(plain, PruningGraph(model, images[:1]).step("first", [3]))
    pruned, plan = pruned_with(model, images, "first", [3], mode)
    wanted, missed = model(images), (plain(images) - model(images)).abs().max()
    lost = (pruned(images) - wanted).abs().max()
    # Zeros of the padding do not follow the rule, as the constant is 0.5; what is left beside that is the ridge's.
    bound = 0.35 if "dilat" in name or name in ("same", "tuples of one") else 0.01
    assert float(lost) < bound * float(missed)
    assert plan.biases == (("reader",) if name == "no bias" and not norm else ())
    if plan.biases:
        again = Doubled(READERS[name](), norm)
        apply_plan(again, Plan.from_json(plan.to_json()))
        again.load_state_dict(pruned.state_dict())
        assert torch.equal(again.eval()(images), pruned(images))


def test_a_plan_with_a_new_bias_goes_on_to_be_cut():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1, bias=False), nn.Conv2d(5, 2, 1)).eval()
    images = torch.randn(8, 3, 4, 4)
    first = PruningGraph(model, images[:1]).step("1", [0])  # before the bias: its rows are cut, too
    network = rebuild(model, capture(model, Plan.empty()))
    apply_plan(network, first)
    pruned, second = pruned_with(network, images, "0", [1])
    third = PruningGraph(pruned, images[:1]).step("1", [2])
    apply_plan(pruned, third)
    plan = first.then(second).then(third)
    assert plan.biases == ("1",) and plan.tensors["1.bias"] == {0: ((1, 2, 4),)}
    again = rebuild(model, capture(model, Plan.empty()))
    apply_plan(again, plan)
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again(images), pruned(images))
    assert Plan.from_json(plan.to_json()) == plan and plan.to_json()["version"] == 2
    with pytest.raises(PruningError, match="gives 7 a bias, which is no convolution or linear layer"):
        apply_plan(again, Plan(biases=("7",)))


def test_flattened_channels_are_made_up_for_in_both_modes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(4 * 9, 5)).eval()
    with torch.no_grad():
        model[0].weight[3] = model[0].weight[1] - model[0].weight[0]
    images = torch.randn(64, 2, 3, 3)
    for mode in ("full", "channels"):
        pruned, _ = pruned_with(model, images, "0", [3], mode)
        assert pruned[2].in_features == 27
        assert float((pruned(images) - model(images)).abs().max()) < 0.02
    reader = compensator_of(model, images, "channels").readers["2"]
    assert (reader.inputs, reader.sharing) == (4, 9)


def test_groups_have_moments_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 3, groups=2)).eval()
    with torch.no_grad():  # in each block of 3 the last filter is minus the first
        for last, first in ((2, 0), (5, 3)):
            model[0].weight[last] = -model[0].weight[first]
            model[0].bias[last] = model[0].bias[first]
    images = torch.randn(32, 2, 6, 6)
    pruned, _ = pruned_with(model, images, "0", [2, 5])
    assert float((pruned(images) - model(images)).abs().max()) < 0.02


@pytest.mark.parametrize("name", READERS)
def test_patches_are_what_the_layer_reads(name):
    torch.manual_seed(0)
    layer = READERS[name]()
    images = torch.randn(3, 4, 9, 8)
    wanted = layer(images).movedim(1, -1).flatten(0, 2)
    reader = Reader("layer", 1, 4, layer.kernel_size[0] * layer.kernel_size[1])
    every = patches(layer, images, reader, 1000, np.arange(3))[0]
    bias = 0 if layer.bias is None else layer.bias
    found = every @ layer.weight.flatten(1).T + bias
    # All places are there, image by image, each once, in an order that begins at another place in each image.
    found, wanted = (one.reshape(3, -1, 6).sort(1).values for one in (found, wanted))
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=2, dilation=2, stride=2), (3, 4, 11)),
        (nn.Conv1d(4, 6, 4, padding="same"), (3, 4, 9)),
        (nn.Conv3d(4, 6, (3, 2, 1), padding=(1, 0, 1), stride=(1, 2, 1)), (3, 4, 5, 6, 4)),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 7, 5)),
        (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect", dilation=2), (3, 4, 7, 5)),
    ],
)
@torch.no_grad()
def test_patches_of_other_dimensions_and_of_groups(layer, shape):
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    reader = Reader("layer", layer.groups, 4 // layer.groups, int(np.prod(layer.kernel_size)))
    every = patches(layer, images, reader, 1000, np.arange(3))  # (groups, n, inputs)
    weight = layer.weight.reshape(layer.groups, 6 // layer.groups, -1)
    found = torch.einsum("gni,goi->ngo", every, weight).flatten(1) + layer.bias
    wanted = layer(images).movedim(1, -1).flatten(0, -2)
    found, wanted = (one.reshape(3, -1, 6).sort(1).values for one in (found, wanted))
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_in_half_precision_have_sums_that_are_not(dtype):
    # 4 images of 16 places: values are 300 everywhere, whose square float16 does not have, and bfloat16 counts no
    # further than 256 in ones.
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(0.0)
    images = torch.full((4, 1, 16, 16), 300.0)
    calibration = CalibrationSet(images.to(dtype), torch.zeros(4, dtype=torch.long), 4)
    found = grams(model.to(dtype), calibration, [Reader("1", 1, 1)])["1"]
    assert found.patches == 1024
    assert found.total[0].tolist() == [[1024 * 90000.0, 1024 * 300.0], [1024 * 300.0, 1024.0]]


def test_parts_of_readers_fit_into_memory_one_by_one_at_least():
    readers = [Reader(name, 1, inputs) for name, inputs in (("a", 9), ("b", 9), ("c", 99), ("d", 9))]
    assert [reader.gram_bytes for reader in readers] == [800, 800, 80_000, 800]
    layers = [[reader.layer for reader in part] for part in parts(readers, 1600)]
    assert layers == [["a", "b"], ["c"], ["d"]]
    assert [len(part) for part in parts(readers)] == [4]


def test_sums_do_not_depend_on_parts_or_chunks():
    torch.manual_seed(0)
    model = Doubled(nn.Conv2d(4, 6, 3)).eval()
    images = torch.randn(10, 3, 7, 7)
    calibration = CalibrationSet(images, torch.zeros(10, dtype=torch.long), 2)
    reader = Reader("reader", 1, 4, 9)
    whole = grams(model, calibration, [reader])["reader"].total
    halves = [grams_of(model, calibration, [reader], np.arange(a, b))["reader"].total for a, b in ((0, 4), (4, 10))]
    assert torch.allclose(sum(halves), whole, rtol=1e-12)
    assert whole[0, -1, -1] == 10 * 25 and torch.equal(whole, whole.transpose(1, 2))


def test_norms_that_alone_read_a_layer():
    model = Doubled(nn.Conv2d(4, 6, 3), norm=True)
    assert norms_after(model) == {"reader": "norm"}
    shared = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert norms_after(nn.Sequential(shared, shared)) == {}  # both run twice


class TwoMaps(nn.Module):
    """Maps flattened to 4 and to 1 features a channel, read by one layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.p, self.q, self.h = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(20, 3)

    def forward(self, x):
        q = nn.functional.adaptive_avg_pool2d(self.q(x), 2).flatten(1)
        return self.h(torch.cat([q, self.p(x).mean((2, 3))], 1))


@pytest.mark.parametrize("mode", ["full", "channels"])
def test_maps_of_several_sizes_have_no_common_block(mode):
    model, images = TwoMaps().eval(), torch.randn(32, 3, 6, 6)
    reader = compensator_of(model, images, mode).readers["h"]
    assert (reader.block, reader.inputs, reader.mixed) == (1, 20, False)
    pruned, _ = pruned_with(model, images, "p", [0], mode)
    assert bool((pruned.h.weight[:, 16:] != 0).all())  # the kept filters of p


class Folded(nn.Module):
    """Two views of an image in the batch; rows of places in the batch of a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.h = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        y = self.b(self.a(x.reshape(-1, 3, 8, 8)).relu())
        y = self.h(y.movedim(1, -1).reshape(-1, 6))
        return y.reshape(len(x), -1, 4).mean(1)


def test_what_is_folded_into_the_batch_is_seen():
    model, images = Folded().eval(), torch.randn(16, 6, 8, 8)
    calibration = CalibrationSet(images, torch.zeros(16, dtype=torch.long), 4, memory_format=torch.contiguous_format)
    found = grams(model, calibration, [Reader("b", 1, 6, 9), Reader("h", 1, 6)])
    assert found["b"].patches == 16 * 2 * 36  # every place of every view
    assert found["h"].patches == 16 * 2 * 36
    pruned_with(model, images, "a", [1])


class Functional(nn.Module):
    """A layer whose weight is used without calling it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return nn.functional.conv2d(self.a(x), self.b.weight, self.b.bias).mean((2, 3))


def test_a_layer_that_is_not_called_is_not_compensated(caplog):
    caplog.set_level("INFO")
    compensator = compensator_of(Functional(), torch.randn(8, 3, 4, 4))
    assert compensator.readers == {}
    assert "not compensated because it is not called as a module of its own: b" in caplog.text


class Convolution(nn.Conv2d):
    """A layer of a user's own."""


class Unusual(nn.Module):
    """Of the layers that read others, none can be compensated."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.depthwise = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4)
        self.own = Convolution(4, 4, 1)
        self.transposed = nn.ConvTranspose2d(4, 4, 2)
        self.b, self.c, self.wide = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4 * 36, 2)
        self.b.register_forward_hook(lambda module, inputs, output: output + 1)
        self.c.bias = self.a.bias

    def forward(self, x):
        x = self.own(self.depthwise(self.a(x)).relu())
        x = self.c(self.b(self.transposed(x).relu()).relu())
        return self.wide(x.permute(0, 2, 3, 1).flatten(1))


def test_what_is_not_compensated_is_named_with_the_reason(caplog, monkeypatch):
    caplog.set_level("INFO", "laasp_ray.search.compensating")
    monkeypatch.setattr(readers_module, "MOST_INPUTS", 100)
    assert compensator_of(Unusual(), torch.randn(8, 3, 7, 7)).readers == {}
    lines = [record.getMessage() for record in caplog.records if "not compensated" in record.getMessage()]
    assert sorted(lines) == [
        "not compensated because it has 144 inputs, more than 100: wide",
        "not compensated because it is a Conv2d: not one of torch's plain layers, or with hooks: b",
        "not compensated because it is a ConvTranspose2d: not one of torch's plain layers, or with hooks: transposed",
        "not compensated because it is a Convolution: not one of torch's plain layers, or with hooks: own",
        "not compensated because it is depthwise: it has no other channel to make up from: depthwise",
        "not compensated because its bias is shared with another layer: c",
    ]


def test_a_layer_with_too_many_inputs_has_one_mix_of_channels_and_that_is_said(caplog, monkeypatch):
    caplog.set_level("INFO", "laasp_ray.search.compensating")
    monkeypatch.setattr(readers_module, "MOST_INPUTS", 30)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 2))
    found = compensator_of(model, torch.randn(8, 3, 6, 6)).readers
    assert {layer: reader.mixed for layer, reader in found.items()} == {"1": True, "2": False}
    assert "1 has too many inputs: one mix of channels serves all taps of its kernel" in caplog.text


def test_moments_that_cannot_be_inverted_raise_the_ridge_until_they_can_or_are_refused(caplog):
    caplog.set_level("INFO", "laasp_ray.pruning.moments")
    # Rounding can leave moments that are no squares: eigenvalues 1 and -0.004, which 0.001 of their mean does not make
    # positive, and 0.01 does. No ridge helps where the diagonal is negative.
    of_a_patch = torch.tensor([[[0.498, 0.502, 0], [0.502, 0.498, 0], [0, 0, 1]]]).double()
    moments = inverted(Gram(8 * of_a_patch), "reader")
    assert "the moments of the inputs of reader are singular: the ridge is 0.01" in caplog.text
    ridge = 0.01 * 0.498
    wanted = torch.linalg.inv(torch.tensor([[0.498 + ridge, 0.502], [0.502, 0.498 + ridge]]).double())
    assert torch.allclose(moments.inverse[0][:2, :2], wanted, rtol=1e-4)
    with pytest.raises(SearchError, match=r"of reader cannot be inverted: use prune\.compensate=off"):
        inverted(Gram(torch.tensor([[[-1.0, 0], [0, 1]]]).double()), "reader")


def test_new_biases_are_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 64, 1, bias=False)).eval()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    step = PruningGraph(model, torch.zeros(1, 3, 4, 4)).step("0", [1]).with_biases(["1"])
    apply_plan(model, step)
    assert parameters_after(shapes, step) == sum(parameter.numel() for parameter in model.parameters()) == 12 + 192 + 64


def test_the_largest_layers_get_one_mix_of_channels_where_all_moments_together_need_too_much():
    small, large, linear = Reader("small", 1, 4, taps=9), Reader("large", 1, 10, taps=9), Reader("linear", 1, 200)
    sizes = {"small": 37**2 * 8, "large": 91**2 * 8, "linear": 201**2 * 8}
    readers = {reader.layer: reader for reader in (small, large, linear)}
    assert {layer: reader.gram_bytes for layer, reader in readers.items()} == sizes
    assert _that_fit(readers, sum(sizes.values())) == readers
    fitting = _that_fit(readers, sum(sizes.values()) - 1)
    assert fitting == {**readers, "large": dataclasses.replace(large, mixed=True)}
    assert fitting["large"].gram_bytes == 11**2 * 8
    # A linear layer has no taps to share a mix.
    assert [reader.mixed for reader in _that_fit(readers, 1).values()] == [True, True, False]
