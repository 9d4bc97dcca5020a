import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laasp_ray.config import (
    SECTIONS,
    DataConfig,
    FilterPruneConfig,
    GroupSparsityConfig,
    LaaspConfig,
    ModelConfig,
    PlsConfig,
    RunConfig,
    SearchConfig,
    TrainConfig,
)
from laasp_ray.config.compat import differing_keys, value_at, with_current_names
from laasp_ray.errors import ConfigError
from laasp_ray.recipes import RECIPES, recipe


def settings(**changes):
    data = recipe("resnet20_cifar10").to_dict()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            data[section][name] = value
        else:
            data[section] = value
    return data


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_survives_json(name):
    config = recipe(name)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_key_names_the_place_and_the_nearest_known_one():
    with pytest.raises(ConfigError, match=r"key prune\.flops_reductoin; did you mean prune\.flops_reduction"):
        RunConfig.from_dict(settings(prune__flops_reductoin=0.3))


def test_missing_key_is_named():
    data = settings()
    del data["train"]["epochs"]
    with pytest.raises(ConfigError, match=r"train\.epochs is missing"):
        RunConfig.from_dict(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prune__flops_reduction", 1.0),
        ("prune__flops_reduction", "half"),
        ("prune__flops_reduction", float("nan")),
        ("prune__step", 0),
        ("prune__max_pruned", 1.0),
        ("prune__criteria", []),
        ("prune__criteria", ["l1", "l1"]),
        ("prune__round_to", 0),
        ("prune__round_to", 1.5),
        ("prune__prunes_per_iteration", 0),
        ("prune__parameters_reduction", 1.0),
        ("prune__parameters_reduction", -0.1),
        ("prune__latency_reduction", 1.0),
        ("prune__latency_batch", 0),
        ("search__reestimate_batchnorm", 1),
        ("train__batch_size", 1.5),
        ("train__prune_epoch", 161),
        ("train__schedule", "linear"),
        ("train__label_smoothing", 1.0),
        ("train__label_smoothing", -0.1),
        ("train__ema", 1.0),
        ("train__ema", -0.1),
        ("train__distill", 1.0),
        ("train__distill", -0.1),
        ("train__distill_temperature", 0.0),
        ("train__test_every", -1),
        ("train__test_every", 0.5),
        ("data__loader", "tensorflow"),
        ("search__images", True),
        ("cluster__trainer_gpu_share", 0.5),
        ("data__mean", [0.5, 0.5]),
        ("seed", None),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(key, value):
    with pytest.raises(ConfigError, match=key.replace("__", r"\.")):
        RunConfig.from_dict(settings(**{key: value}))


def test_a_target_besides_flops_stands_alone_or_with_it():
    alone = RunConfig.from_dict(settings(prune__flops_reduction=0, prune__parameters_reduction=0.3)).prune
    assert alone.targets == {"parameters": 0.3}
    changes = {"prune__flops_reduction": 0.4, "prune__parameters_reduction": 0.3, "prune__latency_reduction": 0.2}
    assert RunConfig.from_dict(settings(**changes)).prune.targets == {"FLOPs": 0.4, "parameters": 0.3, "latency": 0.2}


def test_without_a_target_nothing_is_pruned():
    assert not RunConfig.from_dict(settings(prune__flops_reduction=0)).prunes
    assert RunConfig.from_dict(settings(prune__flops_reduction=0.5)).prunes
    assert RunConfig.from_dict(settings(prune__flops_reduction=0, prune__latency_reduction=0.1)).prunes
    assert RunConfig.from_dict(settings(prune={"method": "group_sparsity"})).prunes


def test_options_are_off_in_every_recipe():
    for name in RECIPES:
        prune, search = recipe(name).prune, recipe(name).search
        assert search.reestimate_batchnorm is False
        if isinstance(prune, LaaspConfig):
            assert (prune.round_to, prune.prunes_per_iteration) == (1, 1)
        assert set(prune.targets) <= {"FLOPs"}


def test_options_that_do_not_fit_together_are_refused():
    with pytest.raises(ConfigError, match=r"search.images is 1, must be at least 2 with search.reestimate_batchnorm"):
        RunConfig.from_dict(settings(search__images=1, search__reestimate_batchnorm=True))
    with pytest.raises(ConfigError, match=r"search.reestimate_batchnorm is True, must be left at False with method gr"):
        RunConfig.from_dict(settings(prune={"method": "group_sparsity"}, search__reestimate_batchnorm=True))
    for key, value in {"prune__iterations": 2, "train__distill": 0.5}.items():
        with pytest.raises(ConfigError, match=rf"{key.replace('__', '.')} is {value}, must be left at 0.* without a t"):
            RunConfig.from_dict(settings(prune__flops_reduction=0, **{key: value}))


@pytest.mark.parametrize("method", ["laasp", "pls", "group_sparsity"])
def test_a_config_has_the_section_of_its_method_and_no_other(method):
    least = {"method": method} | ({} if method == "group_sparsity" else {"flops_reduction": 0.5})
    config = RunConfig.from_dict(settings(prune=least))
    assert type(config.prune) is SECTIONS[method] and config.prune.method == method
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    others = {"laasp": "step", "pls": "percent", "group_sparsity": "group"}
    for owner, key in others.items():
        if owner != method:
            message = rf"prune\.{key} is 3, but it is of method {owner}, and this run's is {method}: leave it out"
            with pytest.raises(ConfigError, match=message):
                RunConfig.from_dict(settings(prune={**least, key: 3}))


def test_a_section_is_of_a_method_that_has_it():
    with pytest.raises(ConfigError, match=r"prune\.method is 'pls', must be 'laasp' or an import path, .* LaaspConfig"):
        LaaspConfig(flops_reduction=0.5, method="pls")
    assert LaaspConfig(flops_reduction=0.5, method="mine:Method").method == "mine:Method"
    with pytest.raises(ConfigError, match=r"'plz'; did you mean pls\? known: laasp, pls, group_sparsity"):
        RunConfig.from_dict(settings(prune__method="plz"))
    with pytest.raises(ConfigError, match=r"prune\.method is 3, must be of type str"):
        RunConfig.from_dict(settings(prune__method=3))
    with pytest.raises(ConfigError, match=r"prune\.method 'json:JSONDecoder' must be a subclass of .*PruningMethod"):
        RunConfig.from_dict(settings(prune__method="json:JSONDecoder"))


def test_a_whole_number_is_taken_where_a_float_is_wanted():
    assert RunConfig.from_dict(settings(train__learning_rate=1)).train.learning_rate == 1.0


def test_image_size_must_be_the_networks():
    with pytest.raises(ConfigError, match=r"data\.image_size is 28"):
        RunConfig.from_dict(settings(data__image_size=28))


@pytest.mark.parametrize("name", ["", "../up", "a/b", "-x"])
def test_a_name_that_is_no_folder_name_is_refused(name):
    with pytest.raises(ConfigError, match="name"):
        RunConfig.from_dict(settings(name=name))


def test_learning_rate_follows_the_paper_schedule():
    # ResNet-20: 0.1, times 0.2 at 40, 80 and 120.
    train = recipe("resnet20_cifar10").train
    rates = [train.learning_rate_at(epoch) for epoch in (0, 39, 40, 79, 80, 119, 120, 159)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008])


def test_the_cosine_schedule_falls_to_zero_and_knows_no_drops():
    train = TrainConfig(epochs=4, prune_epoch=0, learning_rate=0.2, schedule="cosine", drop_epochs=(1,))
    rates = [train.learning_rate_at(epoch) for epoch in range(5)]
    root = math.sqrt(0.5)
    assert rates == pytest.approx([0.2, 0.1 * (1 + root), 0.1, 0.1 * (1 - root), 0.0])


def test_the_learning_rate_is_scaled_with_the_batch_and_rises_to_it():
    train = TrainConfig(
        epochs=10,
        prune_epoch=0,
        batch_size=256,
        batch_per_gpu=128,
        warmup_epochs=4,
        learning_rate=0.1,
        drop_epochs=(8,),
    )
    assert [train.global_batch(parts) for parts in (1, 2, 8)] == [128, 256, 1024]
    # Eight workers: four times the batch, so from 0.1 to 0.4 in four epochs.
    rates = [train.learning_rate_at(epoch, 8) for epoch in (0, 1, 2, 3, 4, 7, 8)]
    assert rates == pytest.approx([0.1, 0.175, 0.25, 0.325, 0.4, 0.4, 0.04])
    assert [train.learning_rate_at(epoch, 2) for epoch in (0, 7)] == pytest.approx([0.1, 0.1])
    plain = dataclasses.replace(train, batch_per_gpu=0)
    assert plain.global_batch(8) == 256 and plain.learning_rate_at(7, 8) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match=r"train\.batch_per_gpu is 1, must be at least 2"):
        dataclasses.replace(train, batch_per_gpu=1)


def test_a_schedule_is_checked_without_a_dictionary_too():
    with pytest.raises(ConfigError, match=r"train\.schedule is 'linear', must be one of 'steps', 'cosine'"):
        TrainConfig(epochs=4, prune_epoch=0, schedule="linear")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LaaspConfig(flops_reduction=0.5, compensate=False), r"prune\.compensate is False, must be one of"),
        (lambda: LaaspConfig(flops_reduction=0.5, compensate="ful"), r"prune\.compensate is 'ful', must be one of"),
        (lambda: LaaspConfig(flops_reduction="0.5"), r"prune\.flops_reduction is '0.5', must be a finite number"),
        (lambda: LaaspConfig(flops_reduction=0.5, criteria="l1"), r"prune\.criteria is 'l1', must be a list"),
        (lambda: LaaspConfig(flops_reduction=0.5, step_rule="flops"), r"prune\.step_rule is 'flops', must be one of"),
        (lambda: SearchConfig(images=100.5), r"search\.images is 100\.5, must be of type int"),
        (lambda: SearchConfig(racing=True), r"search\.racing is True, must be one of 'on', 'off'"),
        (lambda: TrainConfig(epochs=4, prune_epoch=0, ema=None), r"train\.ema is None, must be a finite number"),
        (lambda: ModelConfig(builder="m", input_shape=32), r"model\.input_shape is 32, must be a list"),
        (lambda: dataclasses.replace(recipe("resnet20_cifar10"), seed="1"), r"seed is '1', must be of type int"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_where_a_config_is_built_in_python(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnSection(FilterPruneConfig):
    """The section of a user's own method, with fields of any kind."""

    extra: Any = None
    layers: list[str] = dataclasses.field(default_factory=list)
    size: "int | str" = "auto"
    limit: float = math.inf
    unknown: "NotThere" = 3  # type: ignore[name-defined]  # noqa: F821
    made: dict[str, int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "made", {"a": 1})


def test_keys_that_an_own_section_adds_are_its_own_business():
    section = OwnSection(method="own:Method", flops_reduction=0.5, layers=["a"])
    assert (section.layers, section.size, section.limit, section.made) == (["a"], "auto", math.inf, {"a": 1})
    with pytest.raises(ConfigError, match=r"prune\.compensate is True"):
        OwnSection(method="own:Method", flops_reduction=0.5, compensate=True)


def test_numbers_of_numpy_and_paths_are_taken():
    assert type(SearchConfig(images=np.int64(5)).images) is int
    assert SearchConfig(racing_error=np.float32(0.25)).racing_error == 0.25
    assert DataConfig(path=Path("a") / "b", image_size=8).path == "a/b"


def test_a_list_is_taken_where_a_config_is_built_in_python():
    assert LaaspConfig(flops_reduction=0.5, criteria=["l1", "l2"]).criteria == ("l1", "l2")


def test_differing_keys_leave_out_what_may_change():
    ours = settings()
    theirs = settings(
        storage="elsewhere",
        data__path="/moved",
        data__threads=7,
        data__max_unreadable=99,
        search__batch_size=7,
        search__candidates_per_task=3,
        cluster__workers=4,
        train__test_every=5,
        prune__step=0.02,
        seed=7,
    )
    assert differing_keys(ours, theirs) == ["prune.step", "seed"]
    assert value_at(theirs, "prune.step") == 0.02
    del theirs["train"]["test_every"]  # from before there was this key
    assert differing_keys(ours, theirs) == differing_keys(theirs, ours) == ["prune.step", "seed", "train.test_every"]


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"did you mean resnet20_cifar10\?.*resnet56_cifar10"):
        recipe("resnet20_cifar")


def test_configs_are_frozen_and_keyword_only():
    with pytest.raises(TypeError):
        ModelConfig("torchvision.resnet50")  # type: ignore[misc]
    with pytest.raises(AttributeError):
        TrainConfig(epochs=1, prune_epoch=0).epochs = 2  # type: ignore[misc]


def test_keys_of_an_earlier_version_are_taken_under_their_new_names(caplog):
    given = recipe("resnet20_cifar10").to_dict()
    del given["prune"]["fine_tune_epochs"]
    given["prune"]["recover_epochs"] = 3
    assert RunConfig.from_dict(given).prune.fine_tune_epochs == 3
    assert "prune.recover_epochs is now called prune.fine_tune_epochs" in caplog.text


def test_a_key_under_both_names_is_refused():
    given = recipe("resnet20_cifar10").to_dict()
    given["prune"]["recover_epochs"] = 3
    with pytest.raises(ConfigError, match=r"unknown config key prune.recover_epochs"):
        RunConfig.from_dict(given)


BEFORE = {
    "method": "laasp",
    "flops_reduction": 0.5,
    "step": 0.02,
    "percent": 10.0,
    "components": 2,
    "ignored": ["fc"],
    "fine_tune_epochs": 5,
    "fine_tune_every": 0.1,
}
"""A section as it was when it had the keys of all methods."""


def test_a_config_from_before_each_method_had_a_section_is_read():
    laasp = RunConfig.from_dict(settings(prune=BEFORE, sparsity=None)).prune
    expected = LaaspConfig(flops_reduction=0.5, step=0.02, ignored=("fc",), fine_tune_epochs=5, fine_tune_every=0.1)
    assert laasp == expected
    pls = RunConfig.from_dict(settings(prune=BEFORE | {"method": "pls"}, sparsity=None)).prune
    assert pls == PlsConfig(flops_reduction=0.5, ignored=("fc",), fine_tune_epochs=5, fine_tune_every=0.1)
    sparsity = {"group": 4, "prune": 2, "fc_prune": [1], "stages": [1, 2], "from_run": None}
    sparse = RunConfig.from_dict(settings(prune=BEFORE, sparsity=sparsity)).prune
    assert sparse == GroupSparsityConfig(
        group=4, pruned_per_group=2, fc_pruned_per_group=(1,), stages=(1, 2), ignored=("fc",), fine_tune_epochs=5
    )
    with pytest.raises(ConfigError, match=r"unknown config key prune\.grup"):
        RunConfig.from_dict(settings(prune=BEFORE, sparsity={"grup": 4}))
    with pytest.raises(ConfigError, match=r"unknown config key prune\.stap; did you mean prune\.step"):
        RunConfig.from_dict(settings(prune=BEFORE | {"stap": 1}, sparsity=None))


def test_a_stored_config_from_before_imports_no_method():
    found = with_current_names(settings(prune=BEFORE | {"method": "no_such_module:Method"}, sparsity=None))
    assert found["prune"]["method"] == "no_such_module:Method"
    assert "step" not in found["prune"] and found["prune"]["fine_tune_epochs"] == 5 and "sparsity" not in found
