"""Scores that are kept while weights stay as they are."""

import pytest
import torch
from torch import nn

from laasp_ray import criteria
from laasp_ray.search.scoring import ScoreMemory


@pytest.fixture
def counted(monkeypatch):
    """The calls of criteria."""
    calls, scores = [], criteria.scores

    def count(name, module):
        calls.append(name)
        return scores(name, module)

    monkeypatch.setattr(criteria, "scores", count)
    return calls


def layer(weight):
    module = nn.Conv2d(1, len(weight), 1)
    module.weight.data = torch.tensor(weight).reshape(len(weight), 1, 1, 1)
    return module


def test_equal_weights_are_scored_once(counted):
    memory = ScoreMemory()
    first = memory.scores(["l1", "l2"], "conv", layer([1.0, -3.0]))
    assert {name: scores.tolist() for name, scores in first.items()} == {"l1": [1.0, 3.0], "l2": [1.0, 3.0]}
    assert memory.scores(["l2", "l1"], "conv", layer([1.0, -3.0]))["l1"] is first["l1"]
    assert counted == ["l1", "l2"]
    assert memory.scores(["l1", "euclidean"], "conv", layer([1.0, -3.0]))["euclidean"].tolist() == [4.0, 4.0]
    assert counted == ["l1", "l2", "euclidean"]


@pytest.mark.parametrize("other", [[1.0, -3.0000002], [1.0, -3.0, 2.0], [1.0, 3.0]])
def test_other_weights_are_scored_anew(other, counted):
    memory = ScoreMemory()
    memory.scores(["l1"], "conv", layer([1.0, -3.0]))
    found = memory.scores(["l1"], "conv", layer(other))["l1"]
    assert torch.equal(found, torch.tensor(other).abs())
    assert counted == ["l1", "l1"]


def test_weights_that_are_written_to_are_scored_anew():
    memory, module = ScoreMemory(), layer([1.0, 2.0])
    memory.scores(["l1"], "conv", module)
    module.weight.data[0] = 5.0
    assert memory.scores(["l1"], "conv", module)["l1"].tolist() == [5.0, 2.0]


def test_minus_zero_is_another_weight_and_each_layer_has_its_own(counted):
    memory = ScoreMemory()
    memory.scores(["l1"], "conv", layer([0.0, 2.0]))
    memory.scores(["l1"], "conv", layer([-0.0, 2.0]))
    memory.scores(["l1"], "other", layer([-0.0, 2.0]))
    assert counted == ["l1"] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_every_precision_are_told_apart(dtype, counted):
    memory = ScoreMemory()
    for weight in ([1.0, 2.0], [1.0, 2.0], [1.0, 2.5]):
        memory.scores(["l1"], "conv", layer(weight).to(dtype))
    assert counted == ["l1"] * 2


def test_groups_of_a_transposed_convolution_count():
    memory, weight = ScoreMemory(), torch.tensor([[1.0, 10.0], [2.0, 20.0]]).reshape(2, 2, 1, 1)
    whole, grouped = nn.ConvTranspose2d(2, 2, 1), nn.ConvTranspose2d(2, 4, 1, groups=2)
    whole.weight.data = grouped.weight.data = weight
    assert memory.scores(["l1"], "up", whole)["l1"].tolist() == [3.0, 30.0]
    assert memory.scores(["l1"], "up", grouped)["l1"].tolist() == [1.0, 10.0, 2.0, 20.0]
