"""A value that is changed in place and read again: its losses are the cut network's, whatever the first image shows."""

import numpy as np
import pytest
import torch
from plain_losses import loss_of_copy
from program_networks import IMAGES, Body, made
from torch import nn
from torch.nn import functional

from laasp_ray.config import LaaspConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.search import rank
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.engine import BranchPoints, Engine
from laasp_ray.search.evaluate import CalibrationSet
from laasp_ray.search.program import CannotTrace, Program
from laasp_ray.search.tracing import trace, verdict

LABELS = torch.arange(5) % 4
BLANK = torch.zeros(1, 3, 8, 8)


class Direct(Body):
    def middle(self, x):
        return self.conv(x.relu_()) + x


class ThroughView(Body):
    """The view is changed, and what it is a view of is read."""

    def middle(self, x):
        rows = x.flatten(2)
        rows.clamp_(0.1)
        return self.conv(x)


class OlderView(Body):
    def middle(self, x):
        rows = x.flatten(2)
        return self.conv(functional.relu(x, inplace=True)) + rows.view(x.shape)


class Halves(Body):
    """Of the parts of a value one is changed."""

    def middle(self, x):
        first, second = x[:, :3], x[:, 3:]
        first.mul_(3)
        return self.conv(torch.cat([second, first], 1)) + x


class Dropped(Body):
    """In eval mode what dropout gives is what it was given."""

    def middle(self, x):
        y = functional.dropout(x, 0.5, False)
        y += 1
        return self.conv(y) + x


class Numbers(Body):
    """Adding to a number does not change it for others."""

    def middle(self, x):
        height = x.shape[2]
        one_more = height
        one_more += 1
        return self.conv(x)[:, :, :height] * one_more


KINDS = {ThroughView: "clamp_", OlderView: "relu", Halves: "mul_", Dropped: "iadd"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_that_is_read_again_is_not_traced_and_says_so(kind):
    found = trace(made(kind), BLANK)
    name = KINDS[kind]
    assert found == CannotTrace(
        f"its traced operations do not give what it gives: {name} changes a value that is read again"
    )


@pytest.mark.parametrize("kind", [*KINDS, Direct, Numbers])
def test_losses_are_those_of_cut_networks_behind_a_blank_first_image(kind):
    model, images = made(kind), torch.cat([BLANK, IMAGES[1:]])
    with torch.no_grad():
        model.norm.running_mean.zero_()
        model.norm.bias.fill_(0.5)  # nothing that is blank is negative
        model.stem.bias.zero_()
    graph, macs = PruningGraph(model, images), count_macs(model, images[:1])
    config = LaaspConfig(flops_reduction=0.5, criteria=("l1",), step=0.05)
    tasks = tasks_of(propose(model, graph, macs, measure_baseline(graph, macs, config), config))
    calibration = CalibrationSet(images, LABELS, 2)
    engine = Engine(model, calibration)
    assert any(engine.branch_points.cost(task).copied for task in tasks) == (kind in KINDS)
    found = engine.losses(tasks, np.arange(5))
    for task, losses in zip(tasks, found.values, strict=True):
        assert losses.mean(dtype=np.float64) == pytest.approx(loss_of_copy(model, task, calibration), rel=1e-5), (
            task.name
        )


class OnDark(Body):
    """The trace takes one way, whatever the images; this network the other for bright ones."""

    def middle(self, x):
        if not isinstance(x, torch.fx.Proxy) and x.amax() > 2:
            x = x * 2
        return self.conv(x)


def test_what_a_blank_image_does_not_show_noise_does():
    model = made(OnDark)
    with torch.no_grad():
        model.norm.bias.fill_(0.5)
    assert isinstance(trace(model, BLANK), Program)
    assert verdict(model, BLANK) == "its traced operations do not give what it gives"
    assert BranchPoints(model, BLANK).program is None


class ByValue(Body):
    def middle(self, x):
        return self.conv(x) if float(x.detach().mean()) > -100 else x


def test_branches_by_value_are_measured_on_copies_and_say_why():
    ranking = rank(made(ByValue), IMAGES, LABELS, step=0.05)
    assert len(ranking)
    for entry in ranking:
        assert entry.copied.startswith("its forward pass cannot be traced (TypeError"), entry.copied
        assert np.isfinite(entry.loss)


class Noisy(Body):
    def middle(self, x):
        return self.conv(x + torch.randn_like(x))


class Constant(Body):
    def middle(self, x):
        return self.conv(x + torch.randn(1, 6, 1, 1))


@pytest.mark.parametrize("kind", [Noisy, Constant])
def test_noise_in_eval_mode_is_called_what_it_is(kind):
    reason = verdict(made(kind), IMAGES[:1])
    assert reason == "it is not deterministic in eval mode: the same images give something else every time"


class Picky(Body):
    """Refuses what is no image."""

    def forward(self, x):
        if not isinstance(x, torch.fx.Proxy) and x.min() < 0:
            raise ValueError("negative pixels")
        return super().forward(x)

    def middle(self, x):
        return self.conv(self.relu(x))


def test_a_network_that_refuses_noise_is_judged_by_images():
    assert verdict(made(Picky), IMAGES[:1].abs()) == ""
    with pytest.raises(ValueError, match="negative pixels"):
        verdict(made(Picky), IMAGES[:1])


def test_modules_of_a_network_keep_their_mode_of_working():
    class Own(nn.Module):
        inplace = True

        def forward(self, x):
            return functional.relu(x, inplace=self.inplace)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Own(), nn.ReLU(inplace=True)).eval()
    assert isinstance(trace(model, IMAGES[:1]), Program)
    assert model[1].inplace
    assert model[2].inplace


def test_a_network_whose_outputs_are_not_finite_is_traced_like_any_other():
    model = made(Direct)
    with torch.no_grad():
        model.head.bias[1] = float("nan")
        model.head.bias[2] = float("inf")
    assert verdict(model, IMAGES[:1]) == ""
