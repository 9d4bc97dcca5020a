"""Branch points of a network that is pruned step by step: those that are found anew, without running the network."""

import random
from dataclasses import replace

import pytest
import torch
from helpers import randomise_batchnorm
from torch import nn

from laasp_ray.config import LaaspConfig, ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.models import build
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import capture, rebuild
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.engine import BranchPoints
from laasp_ray.search.remembering import BranchPointMemory, only_pruned

EXAMPLE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CONFIG = LaaspConfig(flops_reduction=0.5, criteria=("l1", "cosine"), step=0.02)


def pruned(model, network, step):
    """The network after a step, rebuilt from the unpruned `model`."""
    after = rebuild(model, network)
    apply_plan(after, step)
    state = capture(after.eval(), network.plan.then(step))
    return after, state


def tasks_for(model, first):
    """The tasks of an iteration on `model`, with the step sizes of the network `first`."""
    baseline = measure_baseline(PruningGraph(first, EXAMPLE), count_macs(first, EXAMPLE), CONFIG)
    return tasks_of(propose(model, PruningGraph(model, EXAMPLE), count_macs(model, EXAMPLE), baseline, CONFIG))


@pytest.mark.parametrize(
    "builder",
    [
        "cifar.resnet20",
        *(
            pytest.param(f"torchvision.{name}", marks=pytest.mark.exhaustive)
            for name in ("mobilenet_v2", "resnext50_32x4d")
        ),
    ],
)
def test_costs_after_a_prune_are_those_that_are_found_anew(builder):
    torch.manual_seed(0)
    model = randomise_batchnorm(build(ModelConfig(builder=builder))).eval()
    network, memory = capture(model, Plan.empty()), BranchPointMemory(EXAMPLE)
    memory.of(network, model)
    current, draw = model, random.Random(1)
    for _ in range(2):
        current, network = pruned(model, network, draw.choice(tasks_for(current, model)[:-1]).step)
        tasks = tasks_for(current, model)
        found, anew = memory.of(network, current), BranchPoints(current, EXAMPLE)
        assert found.untraced == anew.untraced == ""
        assert [found.cost(task) for task in tasks] == [anew.cost(task) for task in tasks]
        assert [found.find(task) for task in tasks] == [anew.find(task) for task in tasks]
    assert memory.found == 1


class Plain(nn.Module):
    """conv (3 -> 4), ReLU, tail (4 -> 2), mean; with `odd` it is not traced."""

    def __init__(self, odd=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.tail, self.odd = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2), odd

    def forward(self, x):
        x = self.conv(x).relu()
        return self.tail(x if not self.odd or x.sum() > 0 else -x).mean((2, 3))


def test_costs_by_hand():
    model, memory = Plain().eval(), BranchPointMemory(EXAMPLE)
    network = capture(model, Plan.empty())
    memory.of(network, model)
    step = PruningGraph(model, EXAMPLE).step("conv", [1])
    after, state = pruned(model, network, step)
    program = memory.of(state, after).program
    # 3 filters of 27 weights at 30 x 30 places; of the transposed layer 2 outputs of 2 x 2 x 2 weights at 31 x 31
    assert program.macs == 3 * 27 * 900 + 2 * 8 * 961
    assert program.branch_point(["tail"]).macs == 2 * 8 * 961
    with pytest.raises(AssertionError, match="not run"):
        next(program.run(EXAMPLE, {}, whole=True))


def test_the_verdict_is_found_anew_after_training_and_kept_after_a_prune():
    model, memory = Plain().eval(), BranchPointMemory(EXAMPLE)
    network = capture(model, Plan.empty())
    step = PruningGraph(model, EXAMPLE).step("conv", [1])
    memory.of(network, model)
    after, state = pruned(model, network, step)
    memory.of(state, after)
    assert memory.found == 1
    trained = replace(state, tensors={**state.tensors, "tail.weight": state.tensors["tail.weight"] + 1e-6})
    memory.of(trained, rebuild(model, trained).eval())
    assert memory.found == 2


def test_a_network_that_is_not_traced_is_looked_at_every_time():
    model, memory = Plain(odd=True).eval(), BranchPointMemory(EXAMPLE)
    network = capture(model, Plan.empty())
    reasons = [memory.of(network, model).untraced for _ in range(2)]
    assert reasons[0] == reasons[1] != ""
    assert memory.found == 2


def test_what_tells_a_prune_from_training():
    before = capture(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), Plan.empty())
    cut = {"0.weight": before.tensors["0.weight"][:1], "0.bias": before.tensors["0.bias"][:1]}
    assert only_pruned(before, before)
    assert only_pruned(before, replace(before, tensors={**before.tensors, **cut}))
    moved = {name: before.tensors[name].nextafter(torch.tensor(9.0)) for name in ("1.weight", "1.bias")}
    assert not only_pruned(before, replace(before, tensors={**before.tensors, **cut, "1.weight": moved["1.weight"]}))
    # A compensated prune moves biases. If all weights were cut, biases are all there is to tell.
    assert only_pruned(before, replace(before, tensors={**before.tensors, **cut, "1.bias": moved["1.bias"]}))
    both = {**cut, "1.weight": before.tensors["1.weight"][:, :1]}
    assert only_pruned(before, replace(before, tensors={**before.tensors, **both}))
    assert not only_pruned(before, replace(before, tensors={**before.tensors, **both, "1.bias": moved["1.bias"]}))
    assert not only_pruned(before, replace(before, tensors={name: tensor[:1] for name, tensor in cut.items()}))
