"""Making layers masked to channels: exact small cases, and why it is the readers that are made masked."""

import copy

import pytest
import torch
from pruning_reference import pruned_copy, randomise
from torch import nn
from torch.nn.utils import parametrizations

from laasp_ray.pruning.channels import plan_of
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.masking import FEW, CannotMask, mask_of, run_deaf, run_deaf_from


def with_weight(layer, values):
    """The layer with these weights, flat, and biases 100, 200, ... if it has any."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(values, dtype=torch.float).reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(100.0 * torch.arange(1, len(layer.bias) + 1))
    return layer


def pixel(*channels):
    return torch.tensor(channels, dtype=torch.float).reshape(1, -1, 1, 1)


def silenced(module, inputs, channels):
    """By definition: the layer's output when these input channels are zeros."""
    axis = -1 if isinstance(module, nn.Linear) else 1
    return module(inputs.index_fill(axis, torch.tensor(channels), 0))


@pytest.mark.parametrize(
    ("layer", "inputs", "channels", "wanted"),
    [
        # 1*1 + 2*10 + 3*100 without the middle one, and a second filter 4, 5, 6
        (with_weight(nn.Conv2d(3, 2, 1), [1, 2, 3, 4, 5, 6]), pixel(1, 10, 100), (1,), [401, 804]),
        # each of the two groups reads two inputs: filters 1, 2 | 3, 4 and 5, 6 | 7, 8
        (
            with_weight(nn.Conv2d(4, 4, 1, groups=2, bias=False), range(1, 9)),
            pixel(1, 10, 100, 1000),
            (0, 3),
            [20, 40, 500, 700],
        ),
        (with_weight(nn.Linear(3, 2), [1, 2, 3, 4, 5, 6]), torch.tensor([[1.0, 10, 100]]), (0, 2), [120, 250]),
        # a transposed convolution has its inputs along the first axis of the weight: 1, 2 | 3, 4 | 5, 6
        (with_weight(nn.ConvTranspose2d(3, 2, 1), [1, 2, 3, 4, 5, 6]), pixel(1, 10, 100), (1,), [601, 802]),
    ],
    ids=["plain", "grouped", "linear", "transposed"],
)
def test_layers_by_hand(layer, inputs, channels, wanted):
    with torch.inference_mode():
        assert run_deaf(layer, inputs, channels).flatten().tolist() == wanted
        assert run_deaf_from(layer, inputs, layer(inputs), channels).flatten().tolist() == wanted


def test_a_linear_layer_may_have_axes_in_between():
    layer = with_weight(nn.Linear(4, 1, bias=False), [1, 2, 3, 4])
    inputs = torch.ones(2, 3, 4)
    with torch.inference_mode():
        for found in (run_deaf(layer, inputs, (3,)), run_deaf_from(layer, inputs, layer(inputs), (3,))):
            assert torch.equal(found, torch.full((2, 3, 1), 6.0))


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    layer = nn.Conv2d(8, 6, 3)
    layer.register_forward_hook(lambda module, inputs, output: output * 3)
    return layer


def with_forward_of_its_own():
    layer = nn.Conv2d(8, 6, 3)
    layer.forward = lambda x: 2 * nn.Conv2d.forward(layer, x)
    return layer


NOT_PLAIN = {
    "subclass": lambda: Doubling(8, 6, 3),
    "hook": hooked,
    "forward": with_forward_of_its_own,
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 6, 3)),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Conv2d(8, 6, 3)),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_layers_that_do_more_than_their_type_says_are_called_as_they_are(kind):
    torch.manual_seed(0)
    layer, inputs = NOT_PLAIN[kind]().eval(), torch.randn(2, 8, 7, 7)
    with torch.inference_mode():
        for channels in [(3,), (0, 1, 2, 5, 7)]:
            wanted = silenced(layer, inputs, channels)
            assert torch.equal(run_deaf(layer, inputs, channels), wanted)
            assert torch.equal(run_deaf_from(layer, inputs, layer(inputs), channels), wanted)


LAYERS = {
    "3x3": lambda: nn.Conv2d(16, 6, 3),
    "stride": lambda: nn.Conv2d(16, 6, 3, stride=2, padding=1, bias=False),
    "dilation": lambda: nn.Conv2d(16, 6, 3, dilation=2, padding="same"),
    "reflect": lambda: nn.Conv2d(16, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(16, 6, (3, 5), padding=(1, 2), padding_mode="circular"),
    "groups": lambda: nn.Conv2d(16, 8, 3, groups=4),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("channels", [(0,), (3, 4, 9, 15), (0, 2, 3, 5, 6, 7, 8, 10, 15)], ids=["one", "few", "many"])
def test_taking_away_and_running_again_agree(kind, channels):
    torch.manual_seed(0)
    layer, inputs = LAYERS[kind](), torch.randn(3, 16, 9, 9)
    before, whole = inputs.clone(), copy.deepcopy(layer.state_dict())
    with torch.inference_mode():
        output = layer(inputs)
        kept = output.clone()
        wanted = silenced(layer, inputs, channels)
        torch.testing.assert_close(run_deaf(layer, inputs, channels), wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(run_deaf_from(layer, inputs, output, channels), wanted, rtol=0, atol=1e-5)
    # nothing that was given has changed
    assert torch.equal(output, kept)
    assert torch.equal(inputs, before)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in layer.state_dict().items())


def test_few_channels_are_taken_away_and_many_are_not():
    """Shown by an `output` that is not the layer's: only taking away looks at it."""
    layer, inputs = nn.Conv2d(16, 2, 1), torch.randn(1, 16, 4, 4)
    few = round(FEW * 16)
    with torch.inference_mode():
        wrong = layer(inputs) + 1000
        assert run_deaf_from(layer, inputs, wrong, tuple(range(few))).min() > 500
        assert run_deaf_from(layer, inputs, wrong, tuple(range(few + 1))).max() < 500


class Separable(nn.Module):
    """conv -> BatchNorm -> relu -> depthwise -> BatchNorm -> conv: what MobileNets are made of."""

    def __init__(self):
        super().__init__()
        self.make = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.again = nn.BatchNorm2d(8)
        self.read = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.read(self.again(self.depthwise(self.norm(self.make(x)).relu())))


def masked_output(model, mask, images):
    """The network's output with forward hooks that put `run_deaf`'s answer in the place of a layer's own."""
    network = copy.deepcopy(model)
    for name, channels in mask.items():
        layer, plain = network.get_submodule(name), model.get_submodule(name)
        layer.register_forward_hook(lambda _, x, y, plain=plain, gone=channels: run_deaf(plain, x[0], gone))
    with torch.inference_mode():
        return network(images)


def test_past_a_depthwise_convolution_and_batchnorms_the_reader_is_deaf():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 6, 6)
    model = randomise(Separable(), images)
    removal = PruningGraph(model, images).removal("make", [1, 6])
    mask = mask_of(removal)
    assert mask == {"read": (1, 6)}
    with torch.inference_mode():
        wanted = pruned_copy(model, plan_of(removal))(images)
        silent = copy.deepcopy(model)
        silent.make.weight[[1, 6]] = 0
        silent.make.bias[[1, 6]] = 0
        at_the_producer = silent(images)
    torch.testing.assert_close(masked_output(model, mask, images), wanted, rtol=0, atol=1e-5)
    # BatchNorm makes of a silenced channel its shift, and the reader hears it
    assert (at_the_producer - wanted).abs().max() > 0.01 * wanted.abs().max()


def test_a_channel_that_several_layers_read_and_flattened_channels():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.make, self.left = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
            self.right = nn.Linear(4 * 9, 2)

        def forward(self, x):
            x = self.make(x)
            return self.left(x).mean((2, 3)) + self.right(x.flatten(1))

    torch.manual_seed(0)
    model, images = Forked().eval(), torch.randn(2, 3, 3, 3)
    removal = PruningGraph(model, images).removal("make", [2])
    mask = mask_of(removal)
    assert mask == {"left": (2,), "right": tuple(range(18, 27))}  # a channel is nine inputs after flattening
    with torch.inference_mode():
        wanted = pruned_copy(model, plan_of(removal))(images)
    torch.testing.assert_close(masked_output(model, mask, images), wanted, rtol=0, atol=1e-5)


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.make, self.norm, self.read = nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.make(x)
        if isinstance(self.norm, nn.LayerNorm):
            return self.read(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.read(self.norm(x))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.LayerNorm(8)], ids=["group", "layer"])
def test_a_norm_over_the_channels_is_masked_too(norm):
    torch.manual_seed(0)
    model, images = Normed(norm).eval(), torch.randn(2, 3, 4, 4)
    removal = PruningGraph(model, images).removal("make", [0, 5])  # one of each half, as the group norm needs
    assert mask_of(removal) == {"norm": (0, 5), "read": (0, 5)}
    with torch.inference_mode():  # masking its reader alone would be wrong
        wanted, masked = pruned_copy(model, plan_of(removal))(images), masked_output(model, {"read": (0, 5)}, images)
    assert (masked - wanted).abs().max() > 0.01 * wanted.abs().max()


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.make, self.read = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.read(nn.functional.normalize(self.make(x), dim=1))


def test_another_statistic_over_the_channels_rules_a_mask_out():
    torch.manual_seed(0)
    removal = PruningGraph(Unit().eval(), torch.randn(2, 3, 4, 4)).removal("make", [0, 5])
    assert mask_of(removal) == CannotMask("the network normalises over its channels")


def test_normalising_over_other_channels_does_not_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))
    graph = PruningGraph(model, torch.randn(1, 3, 4, 4))
    assert mask_of(graph.removal("0", [3])) == {"2": (3,)}
    assert mask_of(graph.removal("2", [1, 2])) == {"3": (1, 2), "4": (1, 2)}
