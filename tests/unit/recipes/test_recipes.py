"""The published figures that recipes must have, and one iteration of each phase of every recipe on tiny real input."""

import dataclasses
import functools

import pytest
import torch
from helpers import randomise_batchnorm, write_digits
from safetensors.torch import save_file
from tiny_recipes import run_here, tiny
from torch import nn

from laasp_ray import load_pruned
from laasp_ray.config import RunConfig
from laasp_ray.config.fields import to_plain
from laasp_ray.config.methods import build_section, with_method
from laasp_ray.cost.macs import count_macs
from laasp_ray.errors import ConfigError
from laasp_ray.models import build
from laasp_ray.pruning.graph import PruningGraph, reachable
from laasp_ray.pruning.plan import apply_plan
from laasp_ray.recipes import RECIPES, VARIANTS, group_sparsity, recipe
from laasp_ray.records import RunState
from laasp_ray.run.events import read_event
from laasp_ray.run.preflight import prepare
from laasp_ray.run.state import initial_state, next_training_phase

# Millions of multiply-accumulates, as printed.
MACS = {
    "vgg16_cifar10": "313.46",
    "resnet20_cifar10": "40.81",
    "resnet32_cifar10": "69.12",
    "resnet56_cifar10": "125.75",
    "resnet110_cifar10": "253.15",
    "resnet18_imagenet": "1814",
    "resnet34_imagenet": "3664",
    "resnet50_imagenet": "4089",
    "mobilenet_v2_imagenet": "300.77",
    "resnet56_cifar10_finetune": "125.75",
    "resnet50_imagenet_finetune": "4089",
    "mobilenet_v2_imagenet_finetune": "300.77",
}
# Every row of the paper's results; ResNet-20 has none.
ROWS = {
    "vgg16_cifar10": (0.346, 0.605),
    "resnet32_cifar10": (0.533,),
    "resnet56_cifar10": (0.526,),
    "resnet110_cifar10": (0.525, 0.585),
    "resnet18_imagenet": (0.422, 0.454),
    "resnet34_imagenet": (0.414, 0.454),
    "resnet50_imagenet": (0.423, 0.539),
    "mobilenet_v2_imagenet": (0.300, 0.545),
}
DIGITS = "resnet50_digits"
FINE_TUNED = {name for name in MACS if name.endswith("_finetune")}
HEAVY = {
    "resnet20_cifar10-2023",
    "resnet32_cifar10",
    "resnet56_cifar10",
    "resnet110_cifar10",
    "resnet34_imagenet",
    "resnet50_imagenet",
    "resnet50_imagenet-pls",
    DIGITS,
}
"""Of the same make as resnet20_cifar10, resnet18_imagenet and resnet56_cifar10-pls, which run by default."""
# A tenth of the filters that no other layer's are coupled to: of ResNet-56 9 x (16 + 32 + 64); of ResNet-50, whose
# blocks have two such convolutions and whose first one is another, 2 x (3 x 64 + 4 x 128 + 6 x 256 + 3 x 512) + 64.
BY_PLS = {"resnet56_cifar10-pls": 101, "resnet50_imagenet-pls": 762}


@functools.lru_cache(maxsize=1)
def network(name):
    config = recipe(name)
    torch.manual_seed(0)
    model = build(config.model)
    return model, count_macs(model, torch.zeros(1, *config.model.input_shape))


def test_every_recipe_is_here():
    assert set(RECIPES) == {*MACS, DIGITS, *(recipe.__name__ for recipe in group_sparsity.RECIPES)}
    assert all(recipe(name).name == name for name in RECIPES)


@pytest.mark.parametrize("name", MACS)
def test_multiply_accumulates_of_the_unpruned_network(name):
    digits = len(MACS[name].partition(".")[2])
    assert f"{network(name)[1].total / 1e6:.{digits}f}" == MACS[name]


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_paper_can_be_reached(name):
    model, macs = network(name)
    config = recipe(name)
    side = min(32, config.model.input_shape[1])  # what is coupled does not depend on the images' size
    graph = PruningGraph(model, torch.zeros(1, 3, side, side))
    assert graph.skipped == {}
    most = reachable(graph, macs, max_pruned=config.prune.max_pruned)
    assert all(row < most for row in ROWS[name])
    assert config.prune.flops_reduction == pytest.approx(max(ROWS[name]), abs=0.0011)


def schedule(config: RunConfig):
    train, rate = config.train, config.train.learning_rate_at
    rates = [epoch for epoch in range(1, train.epochs) if rate(epoch) != rate(epoch - 1)]
    fine_tune = (config.prune.fine_tune_epochs, config.prune.fine_tune_every)
    return (
        train.epochs,
        train.learning_rate,
        train.drop_factor,
        rates,
        train.batch_size,
        train.weight_decay,
        train.prune_epoch,
        fine_tune,
    )


LONG = [60, 120, 160, 190]
SHORT = [40, 80, 120]


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        (["vgg16_cifar10"], None, (160, 0.1, 0.2, SHORT, 256, 5e-4, 30, (3, 0.03))),
        (["resnet20_cifar10"], None, (160, 0.1, 0.2, SHORT, 256, 5e-4, 60, (1, 0.0))),
        (
            ["resnet32_cifar10", "resnet56_cifar10", "resnet110_cifar10"],
            None,
            (200, 0.1, 0.2, LONG, 256, 5e-4, 60, (1, 0.0)),
        ),
        (sorted(VARIANTS["2023"]), "2023", (200, 0.1, 0.1, LONG, 128, 5e-4, 50, (6, 0.02))),
        (
            ["resnet18_imagenet", "resnet34_imagenet", "resnet50_imagenet"],
            None,
            (100, 0.1, 0.1, [30, 60, 90], 256, 1e-4, 25, (2, 0.03)),
        ),
        (["mobilenet_v2_imagenet"], None, (150, 0.05, 0.96, list(range(1, 150)), 256, 4e-5, 37, (2, 0.03))),
    ],
)
def test_schedules(names, variant, expected):
    for name in names:
        assert schedule(recipe(name, variant)) == expected


def test_recipes_of_trained_networks_prune_at_once_with_compensation():
    for name in FINE_TUNED:
        prune, train = recipe(name).prune, recipe(name).train
        assert (train.epochs, train.prune_epoch, train.schedule, train.learning_rate) == (10, 0, "cosine", 0.01)
        assert (prune.compensate, prune.reestimate_batchnorm, prune.criteria[-1]) == ("full", True, "obs")
        assert train.pretrained and initial_state(recipe(name)).phase == "prune"
        fine_tunes = round(prune.flops_reduction / prune.fine_tune_every)
        assert 10 <= train.epochs + fine_tunes * prune.fine_tune_epochs <= 30


def test_what_all_recipes_of_a_data_set_share():
    for name in set(MACS) - FINE_TUNED:
        config = recipe(name)
        assert (config.train.momentum, config.train.nesterov, config.prune.max_pruned) == (0.9, True, 0.75)
        assert config.prune.criteria == ("l1", "l2", "euclidean", "cosine")
        assert config.search.images == (10_000 if name.endswith("cifar10") else 5000)
        if name.endswith("cifar10"):
            assert (config.data.train_transform, config.data.pad, config.data.flip) == ("pad_crop", 4, 0.5)
        rule = ("layer_share", 0.1) if name == "vgg16_cifar10" else ("flops_share", 0.01)
        assert (config.prune.step_rule, config.prune.step) == rule


def test_a_variant_has_a_name_of_its_own_and_only_where_it_is_known():
    assert set(VARIANTS["2023"]) == {f"resnet{depth}_cifar10" for depth in (20, 32, 56, 110)}
    config = recipe("resnet56_cifar10", "2023")
    assert config.name == "resnet56_cifar10-2023"
    assert config.prune.flops_reduction == recipe("resnet56_cifar10").prune.flops_reduction
    with pytest.raises(
        ConfigError, match=r"resnet56_cifar10 has no variant '2022'; its variants: 2023, paper, compensated"
    ):
        recipe("resnet56_cifar10", "2022")
    with pytest.raises(ConfigError, match=r"vgg16_cifar10 has no variant '2023'; its variants: paper, compensated"):
        recipe("vgg16_cifar10", "2023")
    with pytest.raises(ConfigError, match=r"resnet50_aap has no variant 'paper'; it has none"):
        recipe("resnet50_aap", "paper")


PLAIN = (("l1", "l2", "euclidean", "cosine"), "off", False)
MADE_UP = (("l1", "l2", "euclidean", "cosine", "obs"), "full", True)


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("resnet50_digits", PLAIN),
        ("resnet56_cifar10", PLAIN),
        ("resnet50_imagenet", PLAIN),
        ("resnet56_cifar10_finetune", MADE_UP),
    ],
)
def test_the_paper_s_procedure_and_compensation_are_variants_of_every_recipe_of_laasp(name, default):
    def procedure(config):
        return config.prune.criteria, config.prune.compensate, config.prune.reestimate_batchnorm

    whole, paper, compensated = (recipe(name, variant) for variant in (None, "paper", "compensated"))
    assert (procedure(whole), procedure(paper), procedure(compensated)) == (default, PLAIN, MADE_UP)
    assert (paper.name, compensated.name) == (f"{name}-paper", f"{name}-compensated")
    assert paper.train == compensated.train == whole.train


def test_a_trained_network_also_learns_its_own_outputs_and_no_other_recipe_does():
    assert {name for name in RECIPES if getattr(recipe(name).train, "distill", 0)} == FINE_TUNED


def test_the_three_starts():
    scratch = recipe("resnet50_imagenet")
    weights = dataclasses.replace(scratch, train=dataclasses.replace(scratch.train, pretrained="weights.pt"))
    finished = dataclasses.replace(weights, train=dataclasses.replace(weights.train, prune_epoch=90))

    def training_phase(config, phase):
        epochs = next_training_phase(RunState(phase=phase), config).epochs
        return [(epoch.epoch, pytest.approx(epoch.learning_rate)) for epoch in epochs]

    assert initial_state(scratch).phase == "train"
    assert training_phase(scratch, "train") == [(epoch, 0.1) for epoch in range(25)]
    for config, first, rate in ((weights, 25, 0.1), (finished, 90, 1e-4)):
        assert initial_state(config).phase == "prune"
        assert training_phase(config, "fine-tune") == [(first, rate)] * 2
        assert training_phase(config, "final")[0] == (first, rate) and training_phase(config, "final")[-1] == (99, 1e-4)
        assert len(training_phase(config, "final")) == 100 - first


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("pictures"), side=32, train=6, test=3)


def by_pls(name):
    config = recipe(name)
    prune = build_section({**with_method(to_plain(config.prune), "pls"), "exact_target": False})
    return dataclasses.replace(config, name=f"{name}-pls", prune=prune)


RUNS = {
    **{name: functools.partial(recipe, name) for name in (*MACS, DIGITS) if name not in FINE_TUNED},
    "resnet20_cifar10-2023": lambda: recipe("resnet20_cifar10", "2023"),
    **{f"{name}-pls": functools.partial(by_pls, name) for name in ("resnet56_cifar10", "resnet50_imagenet")},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in HEAVY else name for name in RUNS]
)
def test_one_iteration_of_each_phase(name, pictures, tmp_path):
    config = tiny(RUNS[name](), pictures, tmp_path)
    assert config.name == name
    result, events = run_here(config)
    assert [event.name for event in events] == (
        [
            "start",
            "epoch",
            "training_phase",
            "calibration",
            "iteration",
            "epoch",
            "training_phase",
            "epoch",
            "training_phase",
            "finish",
        ]
    )
    assert [event.data["phase"] for event in events if event.name == "epoch"] == ["train", "fine-tune", "final"]
    decision = read_event(next(event for event in events if event.name == "iteration")).decision
    filters = {layer: module.out_channels for layer, module in convolutions(build(config.model)).items()}
    kept = {layer: module.out_channels for layer, module in convolutions(result.model).items()}
    assert all(kept[prune.layer] == filters[prune.layer] - len(prune.filters) for prune in decision.prunes)
    if config.prune.method == "pls":
        assert len(decision.further) > 0
        assert sum(len(prune.filters) for prune in decision.prunes) == BY_PLS[name]
        assert sum(filters.values()) - sum(kept.values()) == BY_PLS[name]
    else:
        assert decision.further == ()
    images = torch.randn(2, *config.model.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(load_pruned(tmp_path / config.name)(images), result.model(images))
    metrics = result.summary["metrics"]
    assert metrics["images"] == 3 and 0 <= metrics["top1"] <= metrics["top5"] == 1.0


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if "mobilenet" in name else pytest.mark.exhaustive) for name in sorted(FINE_TUNED)],
)
def test_one_iteration_of_a_trained_network(name, pictures, tmp_path):
    config = tiny(recipe(name), pictures, tmp_path)
    torch.manual_seed(0)
    save_file(randomise_batchnorm(build(config.model)).state_dict(), tmp_path / "weights.safetensors")
    train = dataclasses.replace(config.train, prune_epoch=0, pretrained=str(tmp_path / "weights.safetensors"))
    result, events = run_here(dataclasses.replace(config, train=train))
    phases = [event.data["phase"] for event in events if event.name == "epoch"]
    assert phases == ["fine-tune", "final", "final"]
    assert [event.name for event in events][:4] == ["start", "baseline", "calibration", "iteration"]
    (details,) = [event.data["details"] for event in events if event.name == "iteration"]
    assert details["compensated"] is not (details["loss_uncompensated"] < details["loss_compensated"])
    images = torch.randn(2, *config.model.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(load_pruned(tmp_path / config.name)(images), result.model(images))


def test_the_variant_recovers_for_six_epochs_after_every_fiftieth(pictures, tmp_path):
    whole = recipe("resnet20_cifar10", "2023")
    prune = dataclasses.replace(whole.prune, flops_reduction=0.05)
    _, events = run_here(dataclasses.replace(tiny(whole, pictures, tmp_path), prune=prune))
    expected, fine_tuned_at, waited = ["start", "epoch", "training_phase", "calibration"], 0.0, 0
    for event in events:
        if event.name == "iteration":
            reduction = event.data["decision"]["flops_reduction"]
            due = reduction - fine_tuned_at >= 0.02
            expected += ["iteration", *["epoch"] * 6, "training_phase"] if due else ["iteration"]
            fine_tuned_at, waited = (reduction if due else fine_tuned_at), waited + (not due)
    assert [event.name for event in events] == [*expected, "epoch", "training_phase", "finish"]
    assert fine_tuned_at > 0 and waited > 0


def convolutions(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def test_vgg_takes_a_tenth_of_a_layers_filters(pictures, tmp_path):
    sizes = prepare(tiny(recipe("vgg16_cifar10"), pictures, tmp_path)).baseline.step_sizes
    assert sorted(sizes.values()) == [6] * 2 + [13] * 2 + [26] * 3 + [51] * 6  # of 64, 128, 256 and 512


def test_mobilenets_depthwise_convolutions_go_with_their_neighbours(pictures, tmp_path):
    config = tiny(recipe("mobilenet_v2_imagenet"), pictures, tmp_path)
    torch.manual_seed(0)
    model = randomise_batchnorm(build(config.model)).eval()
    example = torch.randn(2, *config.model.input_shape, generator=torch.Generator().manual_seed(0))
    graph = PruningGraph(model, example)
    # The expansion, the depthwise convolution and the projection's inputs of a block, from either of the first two.
    block = "features.4.conv"
    for layer in (f"{block}.0.0", f"{block}.1.0"):
        assert {f"{block}.0.0", f"{block}.1.0", f"{block}.2"} <= set(graph.layers[layer].coupled)
        assert graph.step(layer, [0, 5, 7]) == graph.step(f"{block}.0.0", [0, 5, 7])
    apply_plan(model, graph.step(f"{block}.1.0", [0, 5, 7]))
    expansion, depthwise, projection = (model.get_submodule(f"{block}.{place}") for place in ("0.0", "1.0", "2"))
    width = expansion.out_channels
    assert width == 24 * 6 - 3
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (width, width, width)
    assert depthwise.weight.shape == (width, 1, 3, 3) and projection.in_channels == width
    with torch.inference_mode():
        assert model(example).shape == (2, 3)
