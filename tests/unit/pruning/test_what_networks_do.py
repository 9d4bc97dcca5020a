"""What users' networks do between their layers: pruned where a rule covers it, or refused in a right sentence."""

import pytest
import torch
from pruning_reference import pruned_copy, randomise
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from torchvision.ops import FrozenBatchNorm2d

from laasp_ray.cost.macs import count_macs
from laasp_ray.errors import PruningError
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.plan import parameters_after

MAPS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """a (3 -> 8), what a test does, b (-> 4), mean."""

    width = 8

    def __init__(self, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(self.width, 4, 1)
        for name, layer in self.own().items():
            setattr(self, name, layer)

    def own(self):
        return {}

    def between(self, x):
        return x

    def forward(self, x):
        return self.b(self.between(self.a(x))).mean((2, 3))


def kept_by(model, layer, filters, tensor, example=MAPS):
    return PruningGraph(model, example).step(layer, filters).tensors[tensor]


class NormFlattened(nn.Module):
    """The classifier reads channel c of 8 at columns c, c + 8, c + 16, ..., for the norm's output has channels last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8 * 16, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)).flatten(1))


def test_columns_behind_a_layer_norm_with_channels_last_by_hand():
    x = torch.randn(1, 3, 4, 4)
    gone = {8 * place + 4 for place in range(16)}
    kept = tuple(column for column in range(128) if column not in gone)
    assert kept_by(NormFlattened(), "conv", [4], "head.weight", x) == {1: (kept,)}


class Flipped(Body):
    def own(self):
        return {"norm": nn.GroupNorm(1, 8)}

    def between(self, x):
        return self.norm(x).flip(1)


class Padded(Body):
    width = 10

    def own(self):
        return {"norm": nn.GroupNorm(2, 8)}

    def between(self, x):
        return F.pad(self.norm(x), (0, 0, 0, 0, 1, 1))


def test_channels_behind_a_group_norm_are_flipped_or_padded_by_hand():
    assert kept_by(Flipped(), "a", [0, 2], "b.weight") == {1: ((0, 1, 2, 3, 4, 6),)}  # 7 - 2 and 7 - 0 go
    # two blocks of four; one place further behind the channel that is put before them
    assert kept_by(Padded(), "a", [1, 6], "b.weight") == {1: ((0, 1, 3, 4, 5, 6, 8, 9),)}


class Rolled(Body):
    def own(self):
        return {"norm": nn.GroupNorm(1, 8)}

    def between(self, x):
        return self.norm(x).roll(3, 1)


class ShuffledNorm(Body):
    def own(self):
        return {"norm": nn.GroupNorm(1, 8), "shuffle": nn.ChannelShuffle(2)}

    def between(self, x):
        return self.shuffle(self.norm(x))


class Tied(nn.Module):
    """a and b have one weight: what goes from one goes from the other, and the tie holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b, self.head = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 6, 3),
            nn.Conv2d(6, 6, 3),
            nn.Linear(6, 3),
        )
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.a(self.stem(x)).relu().mean((2, 3)) + self.b(self.stem(x)).mean((2, 3)))


def test_tied_weights_are_cut_together():
    model = Tied()
    graph = PruningGraph(model, MAPS)
    plan = graph.step("a", [1, 4])
    kept = (0, 2, 3, 5)
    assert plan.tensors["a.weight"] == plan.tensors["b.weight"] == {0: (kept,)}
    pruned = pruned_copy(model, plan)
    assert pruned.a.weight is pruned.b.weight
    found = sum(parameter.numel() for parameter in pruned.parameters())
    assert found == parameters_after(graph.shapes, plan)
    # stem 24, the weight 324, two biases 12, head 21; after: stem 24, weight 216, biases 8, head 15
    assert (sum(parameter.numel() for parameter in model.parameters()), found) == (381, 263)


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(2 * 4 * 64, 5)

    def forward(self, x):
        return self.head(torch.cat([torch.flatten(self.a(x), 1), torch.flatten(self.b(x), 1)], 1))


@pytest.mark.timeout(60)
def test_two_flattened_branches_that_join_by_hand():
    kept = tuple(column for column in range(512) if not 256 + 64 <= column < 256 + 128)
    assert kept_by(TwoBranches(), "b", [1], "head.weight") == {1: (kept,)}


class PartialResiduals(nn.Module):
    """Half of each block's channels are added to what came in; the numbers are the code's own."""

    def __init__(self, blocks):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(8 + 2 * i, 10 + 2 * i, 1) for i in range(blocks))
        self.head = nn.Linear(8 + 2 * blocks, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            y, c = block(x), x.shape[1]
            x = torch.cat([y[:, :c] + x, y[:, c:]], 1)
        return self.head(x.mean((2, 3)))


@pytest.mark.timeout(60)
def test_partial_residuals_in_a_row_do_not_take_for_ever():
    graph = PruningGraph(PartialResiduals(12), MAPS)
    assert len(graph.layers) + len(graph.skipped) == 13
    assert "slice" in graph.skipped["blocks.3"]


class SpatialGate(Body):
    """CBAM's: mean and maximum over the channels, a convolution, one value for each place."""

    def own(self):
        return {"mix": nn.Conv2d(2, 1, 3, padding=1)}

    def between(self, x):
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.mix(both).sigmoid()


class Focus(Body):
    width = 32

    def between(self, x):
        return torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


class SplitOverHeight(Body):
    def between(self, x):
        top, bottom = x.split([3, 5], 2)
        return torch.cat([bottom.relu(), top], 2)


class Frozen(Body):
    def own(self):
        return {"norm": FrozenBatchNorm2d(8)}

    def between(self, x):
        return self.norm(x)


class PerChannel(Body):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.randn(8))
        self.map = nn.Parameter(torch.randn(1, 8, 8, 8))

    def between(self, x):
        return (x - self.mean.view(1, -1, 1, 1)) * self.map


class Chunked(Body):
    """YOLO's C2f: one half goes on, both are joined again."""

    width = 12

    def own(self):
        return {"inner": nn.Conv2d(4, 4, 3, padding=1)}

    def between(self, x):
        first, second = x.chunk(2, 1)
        return torch.cat([first, second, self.inner(second)], 1)


class Standardised(nn.Conv2d):
    def forward(self, x):
        mean, deviation = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-5), self.bias)


class StandardisedBody(Body):
    def own(self):
        return {"second": Standardised(8, 8, 1)}

    def between(self, x):
        return self.second(x)


class ChannelAttention(Body):
    """Attention among channels: each is a weighted sum of all."""

    def own(self):
        return {"query": nn.Conv2d(8, 6, 1), "key": nn.Conv2d(8, 6, 1), "value": nn.Conv2d(8, 6, 1)}

    width = 6

    def between(self, x):
        q, k, v = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        return ((q @ k.transpose(1, 2)).softmax(-1) @ v).reshape(x.shape[0], -1, *x.shape[2:])


class ResponseNorm(Body):
    """ConvNeXt V2's GRN, and L2 over the channels."""

    def between(self, x):
        norm = x.norm(dim=(2, 3), keepdim=True)
        return F.normalize(x * (norm / (norm.mean(1, keepdim=True) + 1e-6)) + x, dim=1)


class Sizes(Body):
    """Whole-number arithmetic on sizes, and a linear layer that reads a map with channels last."""

    def own(self):
        return {"linear": nn.Linear(8, 8)}

    def between(self, x):
        height = (x.shape[2] + 1) // 2 * 2 - x.shape[2]
        x = F.pad(x, (0, 0, 0, int(height)))
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Branching(Body):
    """Which way depends on the values."""

    def between(self, x):
        return x.relu() if x.mean() > 0 else x.tanh()


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        (Flipped, {"a": 1}),
        (Padded, {"a": 2}),
        (SpatialGate, {"a": 1, "mix": None}),
        (Focus, {"a": 1}),
        (SplitOverHeight, {"a": 1}),
        (Frozen, {"a": 1}),
        (PerChannel, {"a": 1}),
        (Chunked, {"a": 2, "inner": 1}),
        (StandardisedBody, {"a": 1, "second": 1}),
        (ChannelAttention, {"a": 1, "value": None, "key": None, "query": None}),
        (ResponseNorm, {"a": 1}),
        (Sizes, {"a": 1}),
        (Branching, {"a": 1}),
    ],
)
def test_layers_that_can_be_pruned(network, layers):
    """With their blocks; None for a layer that either way is right for."""
    model = randomise(network())
    graph = PruningGraph(model, MAPS)
    wanted = {name: blocks for name, blocks in layers.items() if blocks is not None}
    assert {name: graph.layers[name].blocks for name in wanted} == wanted, graph.skipped
    assert set(graph.layers) <= set(layers)
    for name, group in graph.layers.items():
        width = group.filters // group.blocks
        plan = graph.step(name, [block * width + 1 for block in range(group.blocks)])
        pruned = pruned_copy(model, plan)
        assert pruned(MAPS).shape == model(MAPS).shape
        assert count_macs(pruned, MAPS).total < count_macs(model, MAPS).total


class PixelShuffled(Body):
    width = 2

    def between(self, x):
        return F.pixel_shuffle(x, 2)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 4, 1)
        self.gru, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        x = self.second(self.first(x.flatten(2)))
        return self.head(self.gru(x.transpose(1, 2))[0].mean(1))


@pytest.mark.parametrize(
    ("network", "layer", "reason", "left"),
    [
        (Rolled, "a", "pass through a roll, which moves or picks them by fixed places", []),
        (ShuffledNorm, "a", "coupled to one another", []),
        (PixelShuffled, "a", "coupled to one another", []),
        (Recurrent, "second", "does not run without them", ["first"]),
    ],
)
def test_layers_that_are_refused_with_the_reason(network, layer, reason, left):
    graph = PruningGraph(network(), MAPS)
    assert reason in graph.skipped[layer]
    assert list(graph.layers) == left


def _old_weight_norm(layer):
    return nn.utils.weight_norm(layer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrap",
    [
        _old_weight_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: torch_prune.l1_unstructured(layer, "weight", 0.3),
    ],
)
def test_parametrised_layers_are_refused_and_others_stay_prunable(wrap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), wrap(nn.Conv2d(4, 6, 1)), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        model(MAPS)  # the old kind makes its weight then
    graph = PruningGraph(model, MAPS)
    assert "2.weight is computed by a parametrisation" in graph.skipped["2"]
    assert "parametrisation" in graph.skipped["1"]  # what it makes is read by the parametrised layer
    assert list(graph.layers) == ["0"]


class Noisy(Body):
    def between(self, x):
        return x + torch.randn_like(x)


def test_noise_in_eval_mode_is_told_as_that():
    with pytest.raises(PruningError, match="not deterministic in eval mode"):
        PruningGraph(Noisy(), MAPS)


class ZeroPadded(nn.Module):
    """A shortcut of CIFAR ResNets (option A): the second half of `c` meets zeros, of which there are always eight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        y = self.a(x)
        return self.b(self.norm(self.c(y)) + F.pad(y, (0, 0, 0, 0, 4, 4))).mean((2, 3))


class ConstantsBeside(Body):
    """Four channels of ones beside those of `a`, all met by `d`; or by a depthwise one."""

    width = 12

    def own(self):
        return {"d": nn.Conv2d(3, 12, 1), "each": nn.Conv2d(12, 12, 3, padding=1, groups=12)}

    def forward(self, x):
        beside = torch.cat([self.a(x), torch.ones(len(x), 4, 8, 8, dtype=x.dtype)], 1)
        return self.b(beside * self.d(x)).mean((2, 3))


class ConstantsDepthwise(ConstantsBeside):
    def forward(self, x):
        return self.b(self.each(torch.cat([self.a(x), torch.ones(len(x), 4, 8, 8, dtype=x.dtype)], 1))).mean((2, 3))


class ZeroHalves(Body):
    width = 16

    def own(self):
        return {"c": nn.Conv2d(3, 16, 1)}

    def forward(self, x):
        y = self.a(x)
        return self.b(torch.cat([y, torch.zeros_like(y)], 1) + self.c(x)).mean((2, 3))


class Cropped(Body):
    width = 7

    def between(self, x):
        return F.pad(x, (0, 0, 0, 0, 0, -1))


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.a(x).mean((2, 3)).unfold(1, 2, 2).flatten(1))


@pytest.mark.parametrize(
    ("network", "refused", "left"),
    [
        (ZeroPadded, "c", {"a"}),
        (ConstantsBeside, "d", {"a"}),
        (ConstantsDepthwise, "each", {"a"}),
        (ZeroHalves, "c", {"a"}),
        (Cropped, "a", set()),
        (Windows, "a", set()),
    ],
)
def test_every_filter_can_go_or_the_layer_is_refused(network, refused, left):
    model = network()
    graph = PruningGraph(model, MAPS)
    assert graph.skipped[refused]
    assert set(graph.layers) <= left
    for name, group in graph.layers.items():
        for index in range(group.filters):
            assert pruned_copy(model, graph.step(name, [index]))(MAPS).shape == (2, 4)


class ChannelGate(Body):
    """DANet's attention among channels, of the map with itself."""

    def between(self, x):
        q = x.flatten(2)
        return ((q @ q.transpose(1, 2)).softmax(-1) @ q).reshape(x.shape)


def test_attention_of_channels_with_themselves():
    assert list(PruningGraph(ChannelGate(), MAPS).layers) == ["a"]


class Told:
    def __init__(self, y):
        self.y = y


class Output(nn.Module):
    def __init__(self, give):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.give = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), give

    def forward(self, x):
        return self.give(self.b(self.a(x)))


def test_what_a_network_gives():
    with pytest.raises(PruningError, match="gives a Told, in which there are no tensors"):
        PruningGraph(Output(Told), MAPS)
    graph = PruningGraph(Output(lambda y: y.argmax(1)), MAPS)
    assert list(graph.layers) == ["a"] and "greatest" in graph.skipped["b"]
    assert list(PruningGraph(Output(lambda y: y > 0), MAPS).layers) == ["a"]
    assert list(PruningGraph(Output(lambda y: (y, y.new_zeros(0))), MAPS).layers) == ["a"]
    assert "not finite" in PruningGraph(Output(lambda y: y.log()), MAPS).skipped["a"]


@pytest.mark.filterwarnings("ignore")
def test_modules_that_cannot_be_looked_at_are_named():
    scripted = nn.Sequential(nn.Conv2d(3, 4, 1), torch.jit.script(nn.Conv2d(4, 4, 1)))
    with pytest.raises(PruningError, match="module 1 is TorchScript"):
        PruningGraph(scripted, MAPS)
    with pytest.raises(PruningError, match="module 0 has no weights yet"):
        PruningGraph(nn.Sequential(nn.LazyConv2d(4, 1)), MAPS)


def test_the_hidden_layer_of_a_transformers_block():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3)).eval()
    graph = PruningGraph(model, torch.randn(1, 5, 6), extra_layers=["1.linear1"])
    assert "1.linear1" in graph.layers


def test_a_network_that_fails_says_where():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(5, 2, 1)))
    with pytest.raises(
        PruningError, match=r"cannot be traced with an input of shape .*: it fails in 1\.1 \(RuntimeError"
    ):
        PruningGraph(model, MAPS)


def test_five_dimensional_inputs():
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4), nn.MaxPool3d(2), nn.Conv3d(4, 2, 1), nn.Flatten(2))
    assert list(PruningGraph(model, torch.randn(1, 1, 6, 6, 6)).layers) == ["0"]
