"""Several prunes in one iteration: which go together, what is measured, and what the decision says."""

import logging
import math

import pytest
import torch
from fakes import Scripted
from helpers import first_standing
from plain_losses import mean_loss
from torch import nn

from laasp_ray.config import LaaspConfig, SearchConfig
from laasp_ray.methods.laasp import Laasp
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.plan import apply_plan
from laasp_ray.records import LayerPrune, MeasuredLoss
from laasp_ray.search.evaluate import CalibrationSet
from laasp_ray.search.executor import InProcessExecutor

EXAMPLE = torch.zeros(1, 1, 8, 8)
LAST = f"{__name__}:last"


def last(weights):
    """A criterion that ranks the last filters last."""
    return -torch.arange(len(weights), dtype=torch.float32)


@pytest.fixture
def network():
    """By l1 the first filters of a layer go, for they are the smallest.

    At 8 x 8, multiply-accumulates: 36*8*9 = 2592 in "0", 16*8*8*9 = 9216 in "2", 4*4*8*9 = 1152 in "4", 48 behind:
    13008. A step of 0.2 is 2 filters of "0" (324 + 1152 each), 2 of "2" (1152 + 144), and of "4" the 3 that may go.
    Parameters: 80 + 584 + 292 + 51 = 1007.
    """
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16, 3)).eval()
    with torch.no_grad():
        for index in (0, 2, 4):
            weight = model[index].weight
            weight.copy_(weight.sign() * torch.arange(1.0, len(weight) + 1).reshape(-1, 1, 1, 1) / 20)
    return model


def iteration_of(model, executor, example=EXAMPLE, **changes):
    settings = {"flops_reduction": 0.9, "step": 0.2, "criteria": ("l1", LAST), "prunes_per_iteration": 2, **changes}
    return Laasp().iterate(first_standing(model, example, LaaspConfig(**settings), executor))


LOSSES = {("2", "l1"): 0.5, ("2", LAST): 0.6, ("0", LAST): 0.7, ("4", "l1"): 0.8}


def test_the_next_best_of_another_group_goes_with_the_best(network):
    executor = Scripted(LOSSES)
    iteration = iteration_of(network, executor)
    assert (iteration.decision.layer, iteration.decision.criterion, iteration.decision.filters) == ("2", "l1", (0, 1))
    # The second best is of the same layer; the third is not.
    assert iteration.decision.further == (LayerPrune(layer="0", criterion=LAST, filters=(6, 7)),)
    assert (iteration.decision.loss, iteration.decision.loss_before) == (0.75, 0.25)
    # 36*6*9 + 16*6*6*9 + 4*4*6*9 + 48 are left
    assert iteration.decision.flops_reduction == pytest.approx(1 - (1944 + 5184 + 864 + 48) / 13008, abs=1e-12)
    assert iteration.step.layers == {"2": (2, 3, 4, 5, 6, 7), "0": (0, 1, 2, 3, 4, 5)}
    joint, before = executor.asked[1]
    assert joint.step == iteration.step and joint.mask == {"4": (0, 1), "2": (6, 7)} and before.unpruned
    assert len(iteration.ranking) == 6 and iteration.ranking[0].loss == 0.5


def test_as_many_as_are_asked_for_and_no_more_than_there_are(network):
    for most, layers in ((3, ["2", "0", "4"]), (9, ["2", "0", "4"]), (1, ["2"])):
        iteration = iteration_of(network, Scripted(LOSSES), prunes_per_iteration=most)
        assert [prune.layer for prune in iteration.decision.prunes] == layers
        assert set(iteration.step.layers) == set(layers)


def test_one_prune_a_iteration_measures_nothing_more(network):
    executor = Scripted(LOSSES)
    iteration = iteration_of(network, executor, prunes_per_iteration=1)
    assert len(executor.asked) == 1
    assert (iteration.decision.loss, iteration.decision.further) == (0.5, ())
    assert iteration.step == PruningGraph(network, EXAMPLE).step("2", (0, 1))


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        # Without 2 filters of "2": 2592 + 16*6*8*9 + 4*4*6*9 + 48 = 10416 of 13008, 80 + 438 + 220 + 51 = 789 of 1007.
        # Without 2 of "0" as well: 8040 of 13008, 60 + 330 + 220 + 51 = 661 of 1007.
        ({"flops_reduction": 0.19}, ["2"]),
        ({"flops_reduction": 0.2}, ["2", "0"]),
        ({"flops_reduction": 0.39}, ["2", "0", "4"]),
        ({"flops_reduction": 0.0, "parameters_reduction": 0.21}, ["2"]),
        ({"flops_reduction": 0.0, "parameters_reduction": 0.22}, ["2", "0"]),
        ({"flops_reduction": 0.0, "parameters_reduction": 0.35}, ["2", "0", "4"]),
        ({"flops_reduction": 0.19, "parameters_reduction": 0.34}, ["2", "0"]),
        # What the clock will say nobody knows before.
        ({"flops_reduction": 0.0, "latency_reduction": 0.01}, ["2", "0", "4"]),
        ({"flops_reduction": 0.19, "latency_reduction": 0.01}, ["2", "0", "4"]),
    ],
)
def test_no_more_go_once_the_targets_are_reached(network, targets, layers):
    iteration = iteration_of(network, Scripted(LOSSES), prunes_per_iteration=3, **targets)
    assert [prune.layer for prune in iteration.decision.prunes] == layers


@pytest.mark.parametrize(
    ("target", "exact", "last_filters"),
    [
        # Without 2 filters of "2" 10416 are left. One of "0" takes 36 * 9 and, of the 6 of "2", 6 * 16 * 9 more: 9228.
        (1 - 9228 / 13008, True, (7,)),
        (1 - 9227 / 13008, True, (6, 7)),
        (1 - 9228 / 13008, False, (6, 7)),
    ],
)
def test_the_last_of_several_takes_no_more_than_the_target_needs(network, target, exact, last_filters):
    iteration = iteration_of(network, Scripted(LOSSES), flops_reduction=target, exact_target=exact)
    assert [prune.filters for prune in iteration.decision.prunes] == [(0, 1), last_filters]
    assert iteration.step.layers["0"] == tuple(range(8 - len(last_filters)))
    assert iteration.decision.flops_reduction >= target


def test_those_that_a_race_dropped_or_that_have_no_loss_stay(network):
    dropped, failed = MeasuredLoss(0.1, 5, 0.0, dropped_at=1), MeasuredLoss(math.nan, 0, 0.0, error="broken")
    rest = dict.fromkeys([("0", "l1"), ("4", LAST), ("2", LAST)], failed)
    executor = Scripted({("2", "l1"): 0.5, ("0", LAST): dropped, ("4", "l1"): dropped, **rest})
    iteration = iteration_of(network, executor, prunes_per_iteration=3)
    assert [prune.layer for prune in iteration.decision.prunes] == ["2"] and len(executor.asked) == 1


class Residual(nn.Module):
    """`stem` and `second` make the same four channels; `first` is between them and has two of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.second, self.head = nn.Conv2d(2, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.second(self.first(x).relu())).mean((2, 3)))


def test_one_of_a_coupled_group():
    losses = {("stem", "l1"): 0.5, ("second", LAST): 0.6, ("stem", LAST): 0.65, ("first", "l1"): 0.7}
    torch.manual_seed(0)
    iteration = iteration_of(
        Residual().eval(), Scripted(losses), torch.zeros(1, 3, 4, 4), step=1e-6, prunes_per_iteration=4
    )
    assert [prune.layer for prune in iteration.decision.prunes] == ["stem", "first"]


@pytest.mark.parametrize("joint", [math.nan, math.inf])
def test_the_best_goes_alone_where_all_together_have_no_loss(network, caplog, joint):
    with caplog.at_level(logging.WARNING):
        iteration = iteration_of(network, Scripted(LOSSES, joint))
    assert (iteration.decision.loss, iteration.decision.further) == (0.5, ())
    assert iteration.step == PruningGraph(network, EXAMPLE).step("2", (0, 1))
    assert "only the best goes of 2 by l1 (2 filters), 0 by" in caplog.text


@pytest.mark.parametrize("racing", ["off", "on"])
def test_the_loss_is_that_of_the_network_without_all_of_them(network, racing):
    generator = torch.Generator().manual_seed(1)
    calibration = CalibrationSet(torch.randn(40, 1, 8, 8, generator=generator), torch.arange(40) % 3, 10)
    executor = InProcessExecutor(network, calibration, torch.device("cpu"), SearchConfig(racing=racing), 0)
    iteration = iteration_of(network, executor)
    assert len(iteration.decision.further) == 1
    apply_plan(network, iteration.step)
    assert iteration.decision.loss == pytest.approx(mean_loss(network, calibration), abs=1e-5)
    assert iteration.decision.loss != iteration.ranking[0].loss
