import copy
import json

import pytest
import torch
from torch import nn

from laasp_ray.cost.macs import count_macs
from laasp_ray.errors import PruningError
from laasp_ray.pruning.plan import Plan, apply_plan, macs_after


def two_convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def keep_first(*kept):
    kept = tuple(kept)
    return Plan(
        tensors={
            "0.weight": {0: (kept,)},
            "0.bias": {0: (kept,)},
            "1.weight": {0: (kept,)},
            "1.bias": {0: (kept,)},
            "1.running_mean": {0: (kept,)},
            "1.running_var": {0: (kept,)},
            "2.weight": {1: (kept,)},
        },
        attributes={
            "0": {"out_channels": len(kept)},
            "1": {"num_features": len(kept)},
            "2": {"in_channels": len(kept)},
        },
        layers={"0": kept},
    )


def test_apply_takes_the_kept_indices_and_sets_the_attributes():
    model = two_convolutions()
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    model[1].running_mean.copy_(torch.arange(4.0))
    before = copy.deepcopy(model)
    apply_plan(model, keep_first(1, 3))
    assert torch.equal(model[0].weight, before[0].weight[[1, 3]])
    assert torch.equal(model[0].bias, before[0].bias[[1, 3]])
    assert torch.equal(model[2].weight, before[2].weight[:, [1, 3]])
    assert model[1].running_mean.tolist() == [1.0, 3.0]
    assert (model[0].out_channels, model[1].num_features, model[2].in_channels) == (2, 2, 2)
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad
    assert model[2].weight.grad is None
    assert isinstance(model[2].weight, nn.Parameter)
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in before.named_buffers()]
    assert model(torch.zeros(1, 3, 5, 5)).shape == (1, 2, 3, 3)


def test_then_composes_in_the_first_plans_coordinates():
    both = keep_first(0, 2, 3).then(keep_first(1, 2))
    assert both == keep_first(2, 3)
    assert Plan().then(keep_first(0)) == keep_first(0)
    assert keep_first(0).then(Plan()) == keep_first(0)
    assert Plan().is_empty
    assert Plan.empty() == Plan()
    assert not both.is_empty


def test_then_refuses_an_index_that_the_first_plan_does_not_leave():
    with pytest.raises(PruningError, match=r"0.weight, axis 0: the step keeps index 3, but only 3 are left"):
        keep_first(0, 1, 2).then(keep_first(0, 3))


def test_grouped_columns_each_group_its_own():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]]).reshape(4, 2, 1, 1)
    plan = Plan(tensors={"0.weight": {1: ((1,), (0,))}}, attributes={"0": {"in_channels": 2}})
    apply_plan(model, plan)
    assert model[0].weight.flatten().tolist() == [2, 4, 5, 7]
    # input channels kept of four: 1 and 2
    assert model(torch.tensor([10.0, 100.0]).reshape(1, 2, 1, 1)).flatten().tolist() == [20, 40, 500, 700]


def test_grouped_columns_compose_with_rows_and_with_each_other():
    weight = torch.arange(48.0).reshape(8, 6, 1, 1)  # two groups of four filters with six inputs each
    columns = Plan(tensors={"0.weight": {1: ((0, 1, 4, 5), (1, 2, 3, 5))}}, attributes={"0": {"in_channels": 8}})
    rows = Plan(tensors={"0.weight": {0: ((1, 2, 4, 7),)}}, attributes={"0": {"out_channels": 4}})
    again = Plan(tensors={"0.weight": {1: ((0, 3), (1, 2))}}, attributes={"0": {"in_channels": 4}})
    composed = columns.then(rows).then(again)
    assert composed.tensors == {"0.weight": {0: ((1, 2, 4, 7),), 1: ((0, 5), (2, 3))}}
    stepwise, at_once = (nn.Sequential(nn.Conv2d(12, 8, 1, groups=2, bias=False)) for _ in range(2))
    stepwise[0].weight.data, at_once[0].weight.data = weight.clone(), weight.clone()
    for plan in (columns, rows, again):
        apply_plan(stepwise, plan)
    apply_plan(at_once, composed)
    assert stepwise[0].weight[:, :, 0, 0].tolist() == [[6, 11], [12, 17], [26, 27], [44, 45]]
    assert torch.equal(stepwise[0].weight, at_once[0].weight)


def test_a_depthwise_step_takes_its_groups_columns_along():
    columns = Plan(tensors={"0.weight": {1: ((0,), (1,), (0,))}}, attributes={"0": {"in_channels": 3}})
    depthwise = Plan(
        tensors={"0.weight": {0: ((0, 1),)}},
        attributes={"0": {"in_channels": 2, "out_channels": 2, "groups": 2}},
        layers={"0": (0, 1)},
    )
    second = Plan(
        tensors={"0.weight": {0: ((1,),)}},
        attributes={"0": {"in_channels": 1, "out_channels": 1, "groups": 1}},
        layers={"0": (1,)},
    )
    steps, at_once = (nn.Sequential(nn.Conv2d(6, 3, 1, groups=3, bias=False)) for _ in range(2))
    for model in (steps, at_once):
        model[0].weight.data = torch.arange(6.0).reshape(3, 2, 1, 1)
    for plan in (columns, depthwise, second):
        apply_plan(steps, plan)
    composed = columns.then(depthwise).then(second)
    apply_plan(at_once, composed)
    assert composed.layers == {"0": (1,)}
    assert steps[0].weight.flatten().tolist() == at_once[0].weight.flatten().tolist() == [3.0]


def test_json_round_trip():
    plan = Plan(
        tensors={"a.weight": {0: ((0, 2),), 1: ((1,), (0,))}},
        attributes={"a": {"out_channels": 2}, "n": {"normalized_shape": (3,)}},
        layers={"a": (0, 2)},
    )
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert Plan.from_json(Plan().to_json()).is_empty


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "plan version 3 cannot be read"),
        ({"biases": "conv"}, "plan.biases is 'conv'"),
        ({"extra": 1}, "has .*extra.*wanted the keys"),
        ({"tensors": []}, "plan.tensors is"),
        ({"tensors": {"a": {"x": [[0]]}}}, "'x'"),
        ({"tensors": {"a": {"0": []}}}, "axis with lists"),
        ({"tensors": {"a": {"0": [[1, 1]]}}}, r"plan.tensors\['a'\]\[0\] is \[1, 1\]"),
        ({"tensors": {"a": {"0": [[-1]]}}}, "rising indices"),
        ({"tensors": {"a": {"0": [[]]}}}, "at least one"),
        ({"tensors": {"a": {"0": [["0"]]}}}, "rising indices"),
        ({"attributes": {"a": {"groups": 0}}}, "positive integer"),
        ({"attributes": {"a": {"groups": "2"}}}, "positive integer"),
        ({"layers": {"a": [2.0]}}, r"plan.layers\['a'\]"),
    ],
)
def test_json_that_is_no_plan(change, message):
    with pytest.raises(PruningError, match=message):
        Plan.from_json({**Plan().to_json(), **change})


def test_json_must_be_a_mapping():
    with pytest.raises(PruningError, match="not a plan"):
        Plan.from_json([1])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(tensors={"0.weight": {0: ((4,),)}}), r"0.weight, axis 0: the plan keeps index 4.*\(4, 3, 3, 3\)"),
        (Plan(tensors={"0.weight": {7: ((0,),)}}), "no axis 7"),
        (Plan(tensors={"9.weight": {0: ((0,),)}}), "no module '9'"),
        (Plan(tensors={"0.scale": {0: ((0,),)}}), "no such parameter or buffer"),
        (Plan(tensors={"0.weight": {1: ((0,), (0,), (0,))}}), "3 groups do not divide 4 rows"),
        (Plan(attributes={"0": {"out_chanels": 3}}), "0.out_chanels"),
        (Plan(attributes={"5": {"groups": 3}}), "5.groups"),
        (
            Plan(tensors={"0.weight": {0: ((0,),)}}),
            r"after the plan 0.weight has shape \(1, 3, 3, 3\), .*\(4, 3, 3, 3\)",
        ),
        (Plan(attributes={"1": {"num_features": 3}}), r"after the plan 1.weight has shape \(4,\).* \(3,\)"),
    ],
)
def test_a_plan_that_does_not_fit(plan, message):
    with pytest.raises(PruningError, match=message):
        apply_plan(two_convolutions(), plan)


def test_an_index_that_does_not_exist_leaves_the_network_whole():
    model = two_convolutions()
    with pytest.raises(PruningError):
        apply_plan(model, Plan(tensors={"0.weight": {0: ((0,),)}, "2.weight": {1: ((9,),)}}))
    assert model[0].weight.shape == (4, 3, 3, 3)


def test_macs_after_by_hand():
    model = two_convolutions()
    macs = count_macs(model, torch.zeros(1, 3, 5, 5))
    assert macs.total == 4 * 27 * 9 + 2 * 4 * 9
    assert macs_after(macs, Plan()) == macs.total
    assert macs_after(macs, keep_first(0, 1, 3)) == 3 * 27 * 9 + 2 * 3 * 9
