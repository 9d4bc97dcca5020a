"""Traced programs give what their networks give, whole and branched off."""

import copy

import pytest
import torch
from program_networks import (
    IMAGES,
    TRACEABLE,
    BySize,
    Concatenated,
    InPlaceModule,
    NormFirst,
    NotFoldable,
    SharedModules,
    close,
    made,
    masked_output,
    outputs,
    program_of,
    run,
)
from torch import nn


@pytest.mark.parametrize("kind", TRACEABLE)
def test_a_program_gives_what_its_network_gives(kind):
    model = made(kind)
    program = program_of(model)
    images = IMAGES.clone()
    [(branch_point, number, found)] = program.run(images, {}, whole=True)
    assert (branch_point, number) == (None, 0)
    close(found, outputs(model))
    assert torch.equal(images, IMAGES)


SOME = ((0, 3), (1,), (2, 4, 5))
"""Channels of six that are masked: one mask is few enough to be taken away, the others are not."""


def masks_of(kind):
    """Site by site: every reader on its own, and two at once."""
    branch_points = [("conv",), ("tail",), ("head",), ("conv", "tail"), ("conv", "head")]
    branch_points = [layers for layers in branch_points if kind is not Concatenated or "tail" not in layers]
    return {
        layers: [{layer: tuple(c for c in some if c < 5 or layer != "head") for layer in layers} for some in SOME]
        for layers in branch_points
    }


@pytest.mark.parametrize("kind", TRACEABLE)
@pytest.mark.parametrize("order", [1, -1], ids=["deep last", "deep first"])
def test_all_branches_at_once_spoil_nothing(kind, order):
    model = made(kind)
    program = program_of(model)
    masks = list(masks_of(kind).items())[::order]
    branch_points = {program.branch_point(layers): joint for layers, joint in masks}
    found = run(
        program, {branch_point: [[mask] for mask in joint] for branch_point, joint in branch_points.items()}, whole=True
    )
    assert [entry[:2] for entry in found[-1:]] == [(None, 0)]
    close(found[-1][2], outputs(model))
    assert sorted((branch_point.ready, number) for branch_point, number, _ in found[:-1]) == sorted(
        (branch_point.ready, number) for branch_point, joint in branch_points.items() for number in range(len(joint))
    )
    for branch_point, number, outcome in found[:-1]:
        close(outcome, masked_output(model, branch_points[branch_point][number]))


@pytest.mark.parametrize("kind", TRACEABLE)
def test_several_masks_in_one_batch_are_as_one_by_one(kind):
    model = made(kind)
    program = program_of(model)
    assert program.sized == (kind is BySize)
    if program.sized:
        return  # such a program's batches must have as many rows as there are images
    for layers, masks in masks_of(kind).items():
        [(_, _, joint)] = run(program, {program.branch_point(layers): [masks]})
        close(joint, torch.cat([masked_output(model, mask) for mask in masks]))


@pytest.mark.parametrize("kind", TRACEABLE)
def test_the_network_is_left_alone(kind):
    model = made(kind)
    state = copy.deepcopy(model.state_dict())
    program = program_of(model)
    run(program, {program.branch_point(("conv",)): [[{"conv": (1,)}]]}, whole=True)
    assert not any(module.training for module in model.modules())
    assert model.relu.inplace
    assert model.drop.inplace
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


def test_batchnorms_are_folded_where_nothing_else_reads_the_convolution():
    """Counted by hooks on what is left: operations of the program that are BatchNorms."""

    def norms(kind):
        program = program_of(made(kind))
        return sum(isinstance(operation.run, nn.BatchNorm2d) for operation in program._operations)

    assert norms(InPlaceModule) == 0
    assert norms(NotFoldable) == 1  # `norm` is folded into `stem`, `other` is not
    assert norms(SharedModules) == 2  # called twice
    assert norms(NormFirst) == 1


def test_a_hook_on_a_norm_or_a_forward_of_its_own_forbids_folding():
    model = made(InPlaceModule)
    model.other.register_forward_hook(lambda module, inputs, output: output * 2)
    norm = model.norm
    norm.forward = lambda x: 3 * nn.BatchNorm2d.forward(norm, x)
    program = program_of(model)
    assert sum(isinstance(operation.run, nn.BatchNorm2d) for operation in program._operations) == 2
    [(_, _, found)] = run(program, {}, whole=True)
    close(found, outputs(model))
