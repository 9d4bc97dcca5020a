"""The graph of a pruned network, derived from the one before: exactly the graph that is made anew, or none."""

import random

import pytest
import torch
from pruning_reference import pruned_copy, randomise, some_filters
from torch import nn

from laasp_ray.config import ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.models import build
from laasp_ray.pruning.channels import plan_of
from laasp_ray.pruning.following import GraphMemory, followed
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.joint import joint_removal
from laasp_ray.pruning.plan import Plan, pruned_macs
from laasp_ray.pruning.structure import structure_of

EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def content(graph):
    """All that a graph says, with the order of everything."""
    couplings = {
        name: ([(side, list(channels.items())) for side, channels in coupling.sides.items()], coupling.blocks)
        for name, coupling in graph.couplings.items()
    }
    return [list(part.items()) for part in (graph.layers, graph.skipped, graph.shapes, couplings)]


def network(builder, **arguments):
    torch.manual_seed(0)
    return randomise(build(ModelConfig(builder=builder, arguments=arguments)), EXAMPLE)


def prunes(graph, draw, count):
    """Random prunes: of one layer, or of several that go together."""
    layers = draw.sample([name for name, group in graph.layers.items() if group.filters > 3 * group.blocks], count)
    chosen = {name: some_filters(graph.layers[name], share=0.15, seed=draw.random()) for name in layers}
    return plan_of(joint_removal(graph, chosen))


@pytest.mark.parametrize(
    ("builder", "steps"),
    [
        ("cifar.resnet20", 6),
        ("torchvision.resnet50", 1),
        ("torchvision.mobilenet_v2", 2),
        pytest.param("torchvision.resnet50", 4, marks=pytest.mark.exhaustive),
        pytest.param("torchvision.densenet121", 2, marks=pytest.mark.exhaustive),
        pytest.param("torchvision.resnext50_32x4d", 2, marks=pytest.mark.exhaustive),
        pytest.param("torchvision.efficientnet_b0", 4, marks=pytest.mark.exhaustive),
        pytest.param("torchvision.vgg16_bn", 4, marks=pytest.mark.exhaustive),
        pytest.param("torchvision.googlenet", 4, marks=pytest.mark.exhaustive),
    ],
)
def test_derived_graphs_equal_those_made_anew(builder, steps):
    arguments = {"init_weights": False, "aux_logits": False} if builder.endswith("googlenet") else {}
    model, draw, plan = network(builder, **arguments), random.Random(0), Plan.empty()
    graph, macs = PruningGraph(model, EXAMPLE), count_macs(model, EXAMPLE)
    for number in range(steps):
        step = prunes(graph, draw, count=1 if number != 1 else 2)
        before, plan = plan, plan.then(step)
        model = pruned_copy(model, step)
        found = followed(graph, before, model, plan)
        assert found is not None
        assert content(found) == content(PruningGraph(model, EXAMPLE))
        assert pruned_macs(macs, plan) == count_macs(model, EXAMPLE)
        graph = found


def test_a_graph_is_derived_over_several_steps_at_once():
    model = network("cifar.resnet20")
    graph = PruningGraph(model, EXAMPLE)
    first = graph.step("layer1.0.conv1", [3, 5])
    model = pruned_copy(model, first)
    second = PruningGraph(model, EXAMPLE).step("layer1.0.conv1", [0, 4])  # 0 and 6 of the unpruned network
    third = PruningGraph(pruned_copy(model, second), EXAMPLE).step("conv1", [15])
    plan = first.then(second).then(third)
    model = pruned_copy(pruned_copy(model, second), third)
    found = followed(graph, Plan.empty(), model, plan)
    assert content(found) == content(PruningGraph(model, EXAMPLE))
    assert found.layers["layer1.0.conv1"].filters == 12
    assert found.layers["conv1"].filters == 15


class Counted(nn.Module):
    """a (3 -> 6), between, b (6 -> 4); `between` is what a test does."""

    def __init__(self, between=None, middle=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 2)
        self.middle = nn.Identity() if middle is None else middle
        self.between = between or (lambda network, x: x)

    def forward(self, x):
        return self.head(self.b(self.between(self, self.middle(self.a(x)))).mean((2, 3)))


def derived(model, layer="a", filters=(2,)):
    """The derived graph after a prune, and the one made anew."""
    graph = PruningGraph(model, EXAMPLE)
    step = graph.step(layer, list(filters))
    pruned = pruned_copy(model, step)
    return followed(graph, Plan.empty(), pruned, step), PruningGraph(pruned, EXAMPLE)


def test_the_small_network_is_followed_and_its_numbers_by_hand():
    found, fresh = derived(Counted(), filters=(1, 2))
    assert content(found) == content(fresh)
    inputs = next(side for side in found.couplings["a"].sides if side.module == "b")
    assert (inputs.size, dict(found.couplings["a"].sides[inputs])) == (4, {0: (0,), 1: (1,), 2: (2,), 3: (3,)})
    assert found.shapes["b.weight"] == (4, 4, 1, 1)


def test_one_filter_left_is_not_followed():
    found, fresh = derived(Counted(), filters=(0, 1, 2, 3, 5))
    assert found is None
    assert fresh.skipped["a"] == "one filter left"


def test_one_input_left_in_each_group_is_not_followed():
    model = Counted(middle=nn.Conv2d(6, 6, 3, groups=3))
    found, fresh = derived(model, filters=(0, 2, 4))
    assert found is None  # the grouped convolution has become a depthwise one
    assert fresh.layers["a"].filters == 3


def test_code_that_asks_for_sizes_is_not_followed():
    """With four channels the network does something else; its check has seen it with six, five and three."""
    model = Counted(between=lambda network, x: x.flip(1).relu() if network.a.out_channels == 4 else x)
    found, fresh = derived(model, filters=(2, 4))
    assert found is None
    assert "mixes its channels" in fresh.skipped["a"]


@pytest.mark.parametrize(
    "between",
    [
        lambda network, x: x + torch.ones(1, 1, 1, 1),
        lambda network, x: x if x.shape[1] > 2 else x.relu(),
        lambda network, x: torch.cat(x.chunk(2, 1)[::-1], 1),
    ],
    ids=["a tensor of its own", "a branch on a size", "blocks"],
)
def test_networks_whose_operations_are_not_known_or_cut_channels_have_no_structure(between):
    assert PruningGraph(Counted(between=between), EXAMPLE).structure is None


def test_hooks_and_parametrisations_have_no_structure():
    hooked = Counted()
    hooked.middle.register_forward_hook(lambda module, inputs, output: output)
    assert structure_of(hooked) is None
    parametrised = Counted()
    torch.nn.utils.parametrizations.weight_norm(parametrised.b)
    assert structure_of(parametrised) is None
    assert structure_of(Counted()) is not None


def test_sizes_as_numbers_in_the_code_are_not_followed():
    """ConvNeXt's LayerNorm2d passes its number of channels to a function, so the operations differ."""
    model = network("torchvision.convnext_tiny")
    graph = PruningGraph(model, EXAMPLE)
    step = graph.step("features.0.0", [0, 7])
    assert followed(graph, Plan.empty(), pruned_copy(model, step), step) is None


def test_a_skipped_layer_that_changes_is_not_followed():
    """The filters of `b` are in pairs, so it is skipped; a filter of `a` takes a pair along, and pairs may end."""

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            a = self.a(x)
            return self.head(torch.cat([a, a], 1) + self.b(x)).mean((2, 3))

    found, fresh = derived(Pairs())
    assert "b" in fresh.skipped
    assert found is None


def test_a_plan_that_cuts_more_than_filters_is_not_followed():
    model = Counted()
    graph = PruningGraph(model, EXAMPLE)
    step = graph.step("a", [2])
    more = Plan(step.tensors, {**step.attributes, "head": {"out_features": 1}}, step.layers)
    assert followed(graph, Plan.empty(), pruned_copy(model, step), more) is None


def test_another_network_than_the_plan_says_is_not_followed():
    model = Counted()
    graph = PruningGraph(model, EXAMPLE)
    step, other = graph.step("a", [2]), graph.step("b", [2])
    assert followed(graph, Plan.empty(), pruned_copy(model, other), step) is None


def test_a_network_of_the_same_plan_but_other_shapes_is_not_followed():
    graph = PruningGraph(Counted(), EXAMPLE)
    assert followed(graph, Plan.empty(), Counted(), Plan.empty()) is graph
    assert followed(graph, Plan.empty(), Counted(middle=nn.Conv2d(6, 6, 1)), Plan.empty()) is None


def test_the_memory_makes_a_graph_only_where_none_follows():
    model, made = Counted(), []

    def graph_of(memory, network, plan):
        def fresh():
            made.append(plan)
            return PruningGraph(network, EXAMPLE)

        return memory.graph(network, plan, fresh)

    memory = GraphMemory()
    graph = graph_of(memory, model, Plan.empty())
    assert graph_of(memory, model, Plan.empty()) is graph  # trained in between
    first = graph.step("a", [2])
    model = pruned_copy(model, first)
    graph = graph_of(memory, model, first)
    assert made == [Plan.empty()]
    second = first.then(graph.step("b", [0, 1, 3]))  # leaves one filter
    model = pruned_copy(model, graph.step("b", [0, 1, 3]))
    assert graph_of(memory, model, second).skipped["b"] == "one filter left"
    assert made == [Plan.empty(), second]
