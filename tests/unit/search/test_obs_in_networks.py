"""obs in whole networks: all layers that read a layer's filters count, and those that cannot be made up for."""

import pytest
import torch
from torch import nn

from laasp_ray.errors import ExhaustedError
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.search.compensating import CompensationMemory, Compensator, Measured
from laasp_ray.search.evaluate import CalibrationSet
from laasp_ray.search.grams import grams
from laasp_ray.search.ranking import rank

IMAGES = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32) % 2


class Residual(nn.Module):
    """`stem` and `second` make one stream of four channels, which `first` and `head` read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.second, self.head = nn.Conv2d(5, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x + self.second(self.first(x).relu())).mean((2, 3)))


def compensator_of(model) -> tuple[Compensator, PruningGraph]:
    calibration, graph = CalibrationSet(IMAGES, LABELS, 16), PruningGraph(model, IMAGES[:1])
    compensator = CompensationMemory().at(
        model,
        graph,
        "full",
        Measured(capture(model, Plan.empty())),
        lambda network, readers: grams(model, calibration, readers),
    )
    return compensator, graph


def cost_of(model, compensator, channel, readers=("first", "head")):
    """What the stream's readers lose with a channel: tr(w C w'), C its inputs' covariance given the others."""
    total = 0.0
    for layer in readers:
        taps = 9 if layer == "first" else 1
        inputs = slice(channel * taps, (channel + 1) * taps)
        weight = model.get_submodule(layer).weight.detach().double().flatten(1)[:, inputs]
        given = torch.linalg.inv(compensator.moments[layer].inverse[0][inputs, inputs])
        total += float((weight @ given @ weight.T).trace())
    return total


@pytest.mark.parametrize("least", range(4))
def test_a_stream_loses_what_all_its_readers_together_miss_least(least):
    model = Residual().eval()
    of_first, of_head = (least + 1) % 4, (least + 2) % 4
    with torch.no_grad():  # what one of the two readers misses least, the other one misses
        model.first.weight.normal_()
        model.head.weight.normal_(0, 4)
        for channel, in_first, in_head in ((least, 0.1, 0.1), (of_first, 0.01, 4), (of_head, 4, 0.01)):
            model.first.weight[:, channel] *= in_first
            model.head.weight[:, channel] *= in_head
    compensator, graph = compensator_of(model)
    costs = [cost_of(model, compensator, channel) for channel in range(4)]
    alone = [[cost_of(model, compensator, channel, [layer]) for channel in range(4)] for layer in ("first", "head")]
    assert [costs_.index(min(costs_)) for costs_ in alone] == [of_first, of_head]
    scores = compensator.obs_scores(model, graph, {"stem": 1, "second": 1})
    assert list(scores) == ["stem"]  # one choice for both
    assert int(scores["stem"].argmin()) == costs.index(min(costs)) == least


class Convolution(nn.Conv2d):
    """A layer of a user's own, which cannot be compensated."""


class Readers(nn.Module):
    """Filter 0 of `a` matters to `own` only, of the two layers that read it."""

    def __init__(self, own):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.plain, self.own, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), own(8, 6, 1), nn.Linear(6, 2)
        with torch.no_grad():
            self.plain.weight[:, 0] = 0
            self.own.weight[:, 0] = 50.0
        self.eval()

    def forward(self, x):
        x = self.a(x).relu()
        return self.fc((self.plain(x) + self.own(x)).mean((2, 3)))


def test_a_layer_is_not_scored_if_one_that_reads_it_cannot_be_compensated():
    compensator, graph = compensator_of(Readers(nn.Conv2d))
    assert int(compensator.obs_scores(Readers(nn.Conv2d), graph, {"a": 1})["a"].argmin()) != 0
    compensator, graph = compensator_of(Readers(Convolution))
    assert list(compensator.readers) == ["plain", "fc"]
    assert compensator.obs_scores(Readers(Convolution), graph, {"a": 1}) == {}
    ranking = rank(Readers(Convolution), IMAGES, LABELS, criteria=("l1", "obs"), step=0.05)
    proposed = [(entry.layer, entry.criterion) for entry in ranking]
    proposed += [pair for entry in ranking for pair in entry.candidate.also]
    assert {layer for layer, criterion in proposed if criterion == "obs"} == {"plain"}
    assert {layer for layer, criterion in proposed if criterion == "l1"} == {"a", "plain", "own"}


def test_where_obs_alone_can_score_nothing_that_is_said():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Convolution(8, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ExhaustedError, match=r"obs scores none of the 1 layers .* add l1 to prune\.criteria"):
        rank(model.eval(), IMAGES, LABELS, criteria=("obs",), step=0.1)
