"""What a run consists of, counted by hand, and of every recipe."""

import copy
import dataclasses

import pytest
import torch
from helpers import small_run, write_pictures
from torch import nn

from laasp_ray.config import GroupSparsityConfig
from laasp_ray.config.fields import to_plain
from laasp_ray.config.methods import build_section, with_method
from laasp_ray.methods.group_sparsity import Stage, StagesEstimate
from laasp_ray.methods.laasp import LaaspEstimate
from laasp_ray.methods.pls import PlsEstimate
from laasp_ray.planning.dry_run import Machine, describe
from laasp_ray.planning.workload import network_of, workload_of
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import apply_plan
from laasp_ray.recipes import RECIPES, recipe
from laasp_ray.run.preflight import prepare
from laasp_ray.train.speed import TrainingSpeed

MACHINE = Machine(
    workers=4, tasks=8, trainer=TrainingSpeed(training=100.0, evaluation=200.0, device="x", loader="y"), forward=500.0
)


class TwoConvolutions(nn.Module):
    """At 3 x 16 x 16: 27,648 multiply-accumulates in `a`, 36,864 in `b`, 40 in `fc`. One filter of `a` is
    27,648 / 4 + 36,864 / 4 of them, one of `b` 36,864 / 4 + 10."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.b(self.a(x)).mean((2, 3)))


A, B, FC = 256 * 4 * 27, 256 * 4 * 36, 40
TOTAL = A + B + FC
ONE_EACH = ((B + FC) + FC) / TOTAL
"""A prune of `a` is heard from `b` on, one of `b` from `fc` on."""


def workload(tmp_path, **changes):
    settings = {
        "prune__flops_reduction": 0.7,
        "prune__fine_tune_every": 0.3,
        "prune__fine_tune_epochs": 3,
        "train__epochs": 9,
        "train__prune_epoch": 2,
    }
    if "prune__method" not in changes:
        settings |= {"prune__step": 0.01, "prune__criteria": ["l1", "l2"]}
    settings |= changes
    torch.manual_seed(0)
    model = TwoConvolutions()
    with torch.no_grad():
        for layer in (model.a, model.b):  # the weakest filter by either norm
            layer.weight[2] *= 1e-3
    return workload_of(prepare(small_run(tmp_path, **settings), model))


def test_what_a_run_consists_of_by_hand(tmp_path):
    found = workload(tmp_path)
    # One filter of each layer, the same one by both criteria.
    assert (found.pruning.proposals, found.pruning.candidates) == (4, 2)
    removes = ((A / 4 + B / 4) + (B / 4 + FC / 4)) / 2 / TOTAL
    assert found.pruning.removes == pytest.approx(removes) == pytest.approx(0.1964, abs=1e-4)
    # 0.7 / 0.1964 = 3.56: 4 iterations; 0.3 / 0.1964 = 1.5: a fine-tuning every 2 of them.
    assert (found.pruning.iterations, found.pruning.fine_tunes) == (4, 2)
    assert found.epochs == {"train": 2, "fine-tune": 6, "final": 7}
    # Before the first prune, after two fine-tunings and at the end; of 2 and 7 epochs around them after all but the
    # last.
    assert found.evaluations == 4 + 1 + 6
    assert found.calibration_images == 40
    assert found.pruning.passes == pytest.approx(1 + ONE_EACH, rel=0.01)  # and the network as it stands


@pytest.mark.parametrize(
    ("changes", "fine_tunes", "epochs"),
    [
        ({"prune__fine_tune_every": 0.0}, 4, {"train": 2, "fine-tune": 12, "final": 7}),
        ({"prune__fine_tune_epochs": 0}, 0, {"train": 2, "fine-tune": 0, "final": 7}),
        ({"train__prune_epoch": 0}, 2, {"train": 0, "fine-tune": 6, "final": 9}),
        ({"train__prune_epoch": 9}, 2, {"train": 9, "fine-tune": 6, "final": 0}),
    ],
)
def test_epochs_by_phase(tmp_path, changes, fine_tunes, epochs):
    found = workload(tmp_path, **changes)
    assert (found.pruning.fine_tunes, found.epochs) == (fine_tunes, epochs)


@pytest.mark.parametrize(
    ("changes", "between"),
    [
        ({"train__test_every": 0}, 0),
        ({"train__test_every": 2}, 3),  # the schedule's epochs 4, 6 and 8; the 2nd is the last before the first prune
        ({"train__test_every": 4}, 2),
        ({"train__test_every": 9}, 0),  # the last of all
        ({"train__prune_epoch": 0}, 8),
        ({"train__prune_epoch": 9}, 8),
        ({"train__prune_epoch": 9, "train__test_every": 2}, 4),
        ({"train__pretrained": "given.pt"}, 6),
    ],
)
def test_evaluations_between_epochs(tmp_path, changes, between):
    found = workload(tmp_path, **changes)
    assert found.evaluations == 2 + found.pruning.fine_tunes + between


def test_iterations_by_the_target_that_is_furthest(tmp_path):
    # Of 4 * 27 + 4, 4 * 36 + 4 and 4 * 10 + 10 parameters a prune of `a` takes 28 and 36, one of `b` 37 and 10.
    each = ((28 + 36) + (37 + 10)) / 2 / (112 + 148 + 50)
    assert each == pytest.approx(0.1790, abs=1e-4)
    parameters = {"prune__parameters_reduction": 0.7}
    assert workload(tmp_path, prune__flops_reduction=0.0, **parameters).pruning.iterations == 4  # 3.91
    assert workload(tmp_path, prune__flops_reduction=0.1, **parameters).pruning.iterations == 4
    assert (
        workload(tmp_path, prune__flops_reduction=0.0, prune__parameters_reduction=0.72).pruning.iterations == 5
    )  # 4.02
    assert (
        workload(tmp_path, prune__flops_reduction=0.0, prune__latency_reduction=0.7).pruning.iterations == 4
    )  # as FLOPs: 3.56


@pytest.mark.parametrize(("bound", "iterations", "fine_tunes"), [(3, 3, 1), (4, 4, 2), (9, 4, 2)])
def test_no_more_iterations_than_the_bound(tmp_path, bound, iterations, fine_tunes):
    found = workload(tmp_path, prune__iterations=bound)
    assert (found.pruning.iterations, found.pruning.fine_tunes, found.epochs["fine-tune"]) == (
        iterations,
        fine_tunes,
        3 * fine_tunes,
    )


def test_several_prunes_a_iteration_and_statistics_measured_anew(tmp_path):
    plain = workload(tmp_path)
    joint = workload(tmp_path, prune__prunes_per_iteration=2)
    # 0.7 / (2 * 0.1964) = 1.8 iterations; a fine-tuning after each, which takes more than 0.3.
    assert (joint.pruning.iterations, joint.pruning.fine_tunes) == (2, 2)
    assert joint.pruning.passes == pytest.approx(
        plain.pruning.passes + 2
    )  # all together, and the network as it stands beside them


def test_criteria_of_data_pick_for_themselves_and_look_at_the_images_once(tmp_path):
    for name in ("pls", "own_criteria:MeanActivation"):
        alone = workload(tmp_path, prune__criteria=[name])
        assert (alone.pruning.proposals, alone.pruning.candidates) == (2, 2)
        assert alone.pruning.passes == pytest.approx(2 + ONE_EACH, rel=0.01)
    # Whatever is drawn: of each layer one candidate more, or the norms' again.
    pools = [workload(tmp_path, prune__criteria=["l1", "l2", "pls"], seed=seed) for seed in range(8)]
    assert all(found.pruning.proposals == 6 for found in pools)
    assert {found.pruning.candidates for found in pools} <= {2, 3, 4}
    again = workload(tmp_path, prune__criteria=["l1", "l2", "pls"], seed=7)
    assert again.pruning.candidates == pools[7].pruning.candidates
    full = next(found for found in pools if found.pruning.candidates == 4)
    assert full.pruning.passes == pytest.approx(2 + 2 * ONE_EACH, rel=0.01)


def test_no_more_images_than_there_are(tmp_path):
    assert workload(tmp_path, search__images=100_000).calibration_images == 1442


PLS = {"prune__method": "pls", "prune__percent": 25.0}


def left_by(share):
    """The multiply-accumulates when `a` and `b` have lost this share of their filters."""
    return (A * (1 - share) + B * (1 - share) ** 2 + FC * (1 - share)) / TOTAL


def test_what_pls_takes_by_hand(tmp_path):
    found = workload(tmp_path, **PLS)
    assert (found.pruning.layers, found.pruning.filters, found.pruning.first) == (2, 8, 2)
    # Of 8 filters go 2, of 6 again 2, of 4 one: 5 / 8, halfway between what a half and three quarters take.
    gone = [1 - left_by(0.25), 1 - left_by(0.5), 1 - (left_by(0.5) + left_by(0.75)) / 2]
    assert gone == pytest.approx([0.3571, 0.6428, 0.7500], abs=1e-4)
    # 0.7 is reached by the third; of 0.3 each the second, 0.2857 after the first, does not ask for a fine-tuning.
    assert (found.pruning.iterations, found.pruning.fine_tunes) == (3, 2)
    assert found.pruning.removes == pytest.approx(0.7 / 3)  # the third takes no more than is needed
    assert found.epochs == {"train": 2, "fine-tune": 6, "final": 7}
    assert found.evaluations == 4 + 1 + 6
    assert found.pruning.passes == 3  # the scores, and the losses without what goes and with it
    assert found.calibration_images == 40


@pytest.mark.parametrize(
    ("changes", "iterations", "fine_tunes"),
    [
        ({"prune__iterations": 2}, 2, 1),
        ({"prune__iterations": 5}, 3, 2),
        ({"prune__flops_reduction": 0.35}, 1, 1),
        ({"prune__fine_tune_every": 0.0}, 3, 3),
        ({"prune__fine_tune_epochs": 0}, 3, 0),
        # 8, 6, 4, 3, 2, 1 and none: what is out of reach ends with the last filters.
        ({"prune__flops_reduction": 0.85}, 4, 2),
        ({"prune__flops_reduction": 0.99, "prune__iterations": 20}, 6, 2),
        # Of 310 parameters a quarter leaves 84 + 84 + 40 = 208, a half 56 + 38 + 30 = 124: 32.9% and 60%.
        ({"prune__flops_reduction": 0.0, "prune__parameters_reduction": 0.59}, 2, 1),
        ({"prune__flops_reduction": 0.0, "prune__parameters_reduction": 0.61}, 3, 2),
        ({"prune__flops_reduction": 0.0, "prune__latency_reduction": 0.64}, 2, 1),
    ],
)
def test_iterations_and_fine_tunes_of_pls(tmp_path, changes, iterations, fine_tunes):
    found = workload(tmp_path, **PLS, **changes)
    assert (found.pruning.iterations, found.pruning.fine_tunes) == (iterations, fine_tunes)


def test_pls_prunes_inside_the_blocks_of_a_residual_network(tmp_path):
    config = small_run(tmp_path, prune__method="pls", search__reestimate_batchnorm=True)
    found = workload_of(prepare(config))
    # The first convolutions of 3 blocks each of 16, 32 and 64 filters; a tenth of 336, and of the 302 left 30.
    assert (found.pruning.layers, found.pruning.filters, found.pruning.first) == (9, 336, 34)
    # 34 / 336 of what the blocks' 18 convolutions take is less than 12%, 64 / 336 more.
    assert found.pruning.iterations == 2
    assert found.pruning.passes == 4


def sparse(tmp_path):
    """A network in which a convolution reads 16 and a linear layer 12 inputs."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Conv2d(16, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)
    )
    config = small_run(
        tmp_path,
        prune__method="group_sparsity",
        prune__fine_tune_epochs=4,
        prune__stages=[4, 6],
        prune__fc_pruned_per_group=[3],
    )
    return prepare(config, model)


def test_stages_by_hand(tmp_path):
    found = workload_of(sparse(tmp_path))
    # Linear layers rise in proportion: 3 * 4 // 6 = 2. Of 12 inputs they keep 6 of 8 and 3 of 4, then 5 and 3.
    assert found.pruning.stages == (
        Stage(layers={4: 1, 2: 1}, weights=192 + 120, kept=12 * 8 + 10 * 9, epochs=4),
        Stage(layers={6: 1, 3: 1}, weights=192 + 120, kept=12 * 4 + 10 * 8, epochs=1),
    )
    assert found.pruning.dense == {"0": "3 inputs a filter, fewer than the group of 8"}
    assert found.epochs == {"train": 2, "fine-tune": 4, "final": 1}
    assert found.evaluations == 3 + 1  # of 2 epochs before, 4 in between and 1 after


def test_stages_of_a_network_that_was_pruned_before(tmp_path):
    prepared = sparse(tmp_path)
    assert network_of(prepared) is prepared.unpruned
    step = PruningGraph(prepared.unpruned, prepared.example_input).step("0", range(8))
    pruned = copy.deepcopy(prepared.unpruned)
    apply_plan(pruned, step)
    prepared = dataclasses.replace(prepared, begun_with=capture(pruned, step))
    assert network_of(prepared)[1].weight.shape == (12, 8, 1, 1)
    assert [(stage.weights, stage.kept) for stage in workload_of(prepared).pruning.stages] == [
        (96 + 120, 12 * 4 + 10 * 9),
        (96 + 120, 12 * 2 + 10 * 8),
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), side=32, train=6, test=3)


def planned(name, pictures, method=None):
    """The recipe on three classes of a few pictures, at 32 x 32 where filters are removed; the rest is as it was."""
    config = recipe(name)
    side = config.data.image_size if isinstance(config.prune, GroupSparsityConfig) else min(32, config.data.image_size)
    arguments = {**config.model.arguments, "num_classes": 3}
    return prepare(
        dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, arguments=arguments, input_shape=(3, side, side)),
            data=dataclasses.replace(config.data, path=str(pictures), format="folder", image_size=side),
            train=dataclasses.replace(config.train, pretrained=None),  # the plan does not depend on the weights
            prune=config.prune if method is None else build_section(with_method(to_plain(config.prune), method)),
        )
    )


HEAVY = {
    "resnet18_imagenet",
    "alexnet_aap",
    "resnet56_cifar10",
    "resnet110_cifar10",
    "resnet34_imagenet",
    "resnet50_imagenet",
    "resnet50_digits",
    "resnet50_imagenet_finetune",
    "resnet56_cifar10_finetune",
    "resnet152_aap",
    "vgg16_aap",
}
SPARSE_LAYERS = {
    "alexnet_grouped_aap": 4,
    "alexnet_aap": 4,
    "vgg16_aap": 12,
    "resnet50_aap": 52,
    "resnet152_aap": 154,
    "squeezenet1_0_aap": 25,
    "mobilenet_v1_aap": 13,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in HEAVY else name for name in RECIPES]
)
def test_every_recipe_has_a_plan(name, pictures):
    prepared = planned(name, pictures)
    found, train, prune = workload_of(prepared), prepared.config.train, prepared.config.prune
    pruning = found.pruning
    assert (found.epochs["train"], found.epochs["final"]) == (train.prune_epoch, train.epochs - train.prune_epoch)
    text = describe(prepared, found, MACHINE)
    assert f"Dry run of {name}" in text and "time, all" in text
    if isinstance(pruning, StagesEstimate):
        # One stage; the first convolution stays dense, and so do linear layers and depthwise convolutions.
        (stage,) = pruning.stages
        assert stage.layers == {12: SPARSE_LAYERS[name]} and stage.kept * 4 == stage.weights
        assert f"stage 1          12 of 16 in {SPARSE_LAYERS[name]} layers: {stage.kept:,} of {stage.weights:,}" in text
        assert "3 inputs a filter, fewer than the group of 16" in text and "iterations" not in text
        return
    assert isinstance(pruning, LaaspEstimate)
    assert (pruning.iterations - 1) * pruning.removes < prune.flops_reduction <= pruning.iterations * pruning.removes
    assert (
        0 < pruning.fine_tunes <= pruning.iterations
        and found.epochs["fine-tune"] == pruning.fine_tunes * prune.fine_tune_epochs
    )
    assert f"about {pruning.iterations}: {prune.flops_reduction:.2%} of FLOPs" in text


@pytest.mark.exhaustive
def test_pls_on_resnet56_needs_as_many_iterations_as_published(pictures):
    found = workload_of(planned("resnet56_cifar10", pictures, "pls"))
    assert isinstance(found.pruning, PlsEstimate)
    assert (found.pruning.layers, found.pruning.filters, found.pruning.first) == (27, 1008, 101)
    assert found.pruning.iterations == 8  # for 52.56%
