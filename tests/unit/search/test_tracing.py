"""What cannot be traced or branched off says why, and is measured as a copy; nothing is computed more than need be."""

import numpy as np
import pytest
import torch
from plain_losses import loss_of_copy
from program_networks import IMAGES, Body, InPlaceModule, made, program_of
from torch import nn
from torch.nn import functional

from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.masking import CannotMask, mask_of
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.pruning.verify import clone_sharing_parameters
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, LossTask
from laasp_ray.search.program import CannotTrace
from laasp_ray.search.tracing import trace

LABELS = torch.arange(5) % 4


class TransposedToSize(Body):
    """A layer that is told more than its input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ConvTranspose2d(6, 6, 3, stride=2, padding=1)

    def middle(self, x):
        return self.conv(self.relu(x), [16, 16])


class ByWeight(Body):
    def middle(self, x):
        return functional.conv2d(self.relu(x), self.conv.weight, self.conv.bias, padding=1)


@pytest.mark.parametrize(
    ("kind", "layers", "reason"),
    [
        (ByWeight, ("conv",), "conv is not called as a module of its own"),
        (ByWeight, ("tail", "conv"), "conv is not called as a module of its own"),
        (TransposedToSize, ("conv",), "conv takes more than its input"),
        (InPlaceModule, ("nowhere",), "nowhere is not called as a module of its own"),
        (InPlaceModule, (), "no layer reads the channels"),
    ],
)
def test_where_a_prune_cannot_branch_off(kind, layers, reason):
    assert program_of(made(kind)).branch_point(layers) == CannotMask(reason)


class DependsOnValues(Body):
    def middle(self, x):
        return self.conv(x) if x.mean() > 100 else self.relu(x)


class SetsItems(Body):
    def middle(self, x):
        x = self.relu(x)
        x[:, :, 0] = 0
        return self.conv(x)


class WritesOut(Body):
    def middle(self, x):
        y = torch.empty_like(x)
        torch.mul(x, 2, out=y)
        return self.conv(y)


class Fills(Body):
    def middle(self, x):
        return self.conv(x.clamp_(0).add_(torch.zeros_like(x).normal_(0, 0)))


class MutatingLayer(Body):
    """Its layer changes its input, which others read."""

    class Greedy(nn.Conv2d):
        def forward(self, x):
            return super().forward(functional.relu(x, inplace=True))

    def __init__(self):
        super().__init__()
        self.conv = self.Greedy(6, 6, 3, padding=1)

    def middle(self, x):
        return self.conv(x) + x


class SetsAttribute(Body):
    def middle(self, x):
        return self.conv(x.requires_grad_(False))


class TwoOutputs(Body):
    def middle(self, x):
        return self.conv(self.relu(x))

    def forward(self, x):
        x = self.middle(self.stem(x))
        return self.head(self.tail(x).mean((2, 3))), x


UNTRACEABLE = {
    DependsOnValues: "its forward pass cannot be traced (TraceError: ",
    SetsItems: "its forward pass cannot be traced (TypeError: ",
    WritesOut: "mul writes into a tensor given to it",
    Fills: "normal_ changes a tensor in place",
    MutatingLayer: "conv changes its input in place",
    SetsAttribute: "requires_grad_ changes a tensor in place",
    TwoOutputs: "it does not make one tensor of one tensor",
}


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_what_cannot_be_traced_says_why(kind):
    found = trace(made(kind), IMAGES[:1])
    assert isinstance(found, CannotTrace)
    assert found.reason.startswith(UNTRACEABLE[kind])


def prune_stem(model, filters):
    """A task that takes these of the six channels that `conv` and `tail` of a Body read."""
    step = Plan(
        tensors={
            **{f"stem.{leaf}": {0: (filters,)} for leaf in ("weight", "bias")},
            **{f"norm.{leaf}": {0: (filters,)} for leaf in ("weight", "bias", "running_mean", "running_var")},
            "conv.weight": {1: (filters,)},
        },
        attributes={
            "stem": {"out_channels": len(filters)},
            "norm": {"num_features": len(filters)},
            "conv": {"in_channels": len(filters)},
        },
    )
    return LossTask("stem", step, {"conv": tuple(sorted(set(range(6)) - set(filters)))})


@pytest.mark.parametrize("kind", [SetsItems, ByWeight, SetsAttribute])
def test_then_the_engine_measures_copies(kind):
    model, calibration = made(kind), CalibrationSet(IMAGES, LABELS, 2)
    engine = Engine(model, calibration)
    tasks = [prune_stem(model, kept) for kept in ((0, 1, 2, 4, 5), (3, 4))] + [LossTask("as is", Plan.empty(), {})]
    found = engine.losses(tasks, np.arange(5))
    assert not found.errors
    reason = UNTRACEABLE.get(kind, "conv is not called as a module of its own")
    assert [engine.branch_points.cost(task).copied.startswith(reason) for task in tasks[:-1]] == [True, True]
    assert engine.branch_points.cost(tasks[-1]).copied == ""
    for task, losses in zip(tasks, found.values, strict=True):
        assert losses.mean(dtype=np.float64) == pytest.approx(loss_of_copy(model, task, calibration), rel=1e-5)


def test_copies_take_other_ways_when_values_say_so():
    """What the network does with data-dependent control flow is decided anew for every copy and batch."""
    model, calibration = made(DependsOnValues), CalibrationSet(IMAGES, LABELS, 2)
    graph = PruningGraph(model, IMAGES)
    removal = graph.removal("tail", [0, 2])
    task = LossTask("tail", graph.step("tail", [0, 2]), mask_of(removal))
    found = Engine(model, calibration).losses([task], np.arange(5)).values[0]
    with torch.inference_mode():
        pruned = clone_sharing_parameters(model)
        apply_plan(pruned, task.step)
        wanted = functional.cross_entropy(pruned(IMAGES), LABELS, reduction="none").numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


class Spied(nn.ReLU):
    """Counts its calls, over all copies of the module."""

    calls = 0

    def forward(self, x):
        Spied.calls += 1
        return super().forward(x)


Spied.__module__ = "torch.nn.modules.activation"  # a leaf of the trace, as torch's own are


def test_what_comes_before_the_branches_is_computed_once_a_chunk():
    model = made(InPlaceModule)
    model.relu = nn.Identity()
    model.stem = nn.Sequential(model.stem, Spied())
    engine = Engine(model, CalibrationSet(IMAGES, LABELS, 2))
    tasks = [
        LossTask("", Plan(layers={"": (0,)}), {layer: (channel,)})
        for layer in ("conv", "tail")
        for channel in (0, 1, 4)
    ]
    for some in (tasks[:1], tasks):
        Spied.calls = 0
        assert not engine.losses(some, np.arange(5)).errors
        assert Spied.calls == 3  # chunks of 2, 2 and 1 images


def test_nothing_behind_the_last_branching_point_is_computed_but_by_branches():
    model = made(InPlaceModule)
    model.head = nn.Sequential(Spied(), model.head)
    engine = Engine(model, CalibrationSet(IMAGES, LABELS, 5))
    tasks = [LossTask("", Plan(layers={"": (0,)}), {"tail": (channel,)}) for channel in (0, 1, 4)]
    for some, calls in ((tasks, 3), ([*tasks, LossTask("as is", Plan.empty(), {})], 4)):
        Spied.calls = 0
        engine.losses(some, np.arange(5))
        assert Spied.calls == calls
