"""What may be searched beside the target."""

import pytest
from ray import tune

from laasp_ray.errors import ConfigError
from laasp_ray.recipes import recipe
from laasp_ray.sweep.space import Study, check_space, read_space, with_settings

PLAIN = {
    "prune.step": {"uniform": [0.01, 0.05]},
    "prune.fine_tune_epochs": {"int": [1, 3]},
    "prune.criteria": {"choice": [["l1"], ["l1", "cosine"]]},
    "train.distill": {"choice": [0, 0.5]},
}


def test_yaml_and_tunes_own_domains_say_the_same(tmp_path):
    (tmp_path / "space.yaml").write_text(
        "prune.step: {uniform: [0.01, 0.05]}\nprune.fine_tune_epochs: {int: [1, 3]}\n"
        "prune.criteria: {choice: [[l1], [l1, cosine]]}\ntrain.distill: {choice: [0, 0.5]}\n"
    )
    (tmp_path / "space.py").write_text(
        "from ray import tune\nSPACE = {'prune.step': tune.uniform(0.01, 0.05), 'prune.fine_tune_epochs': "
        "tune.randint(1, 4), 'prune.criteria': tune.choice([['l1'], ['l1', 'cosine']]), 'train.distill': "
        "{'choice': [0, 0.5]}}\n"
    )
    assert read_space(tmp_path / "space.yaml") == read_space(tmp_path / "space.py") == PLAIN
    check_space(PLAIN, recipe("resnet20_cifar10"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must map keys to what may be chosen"),
        ("- 1", "must map keys"),
        ("a: [", "is no YAML"),
        ("prune.step: 3", r"the space has 3 for prune\.step: give one of choice, uniform, loguniform, int"),
        ("prune.step: {uniform: 3}", r"uniform: 3 for prune\.step: give a list"),
        ("prune.step: {uniform: [0.5, 0.1]}", r"give \[low, high\], low below high"),
        ("prune.step: {loguniform: [0, 0.1]}", r"give \[low, high\]"),
        ("prune.fine_tune_epochs: {int: [1, 2.5]}", r"give \[low, high\]"),
        ("prune.step: {choice: []}", "give a list"),
    ],
)
def test_what_is_no_space_is_told(tmp_path, text, message):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_space(tmp_path / "space.yaml")


def test_a_file_that_cannot_be_used_is_told(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        read_space(tmp_path / "none.yaml")
    (tmp_path / "space.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match="cannot be run: ZeroDivisionError"):
        read_space(tmp_path / "space.py")
    (tmp_path / "space.py").write_text("OTHER = {}")
    with pytest.raises(ConfigError, match="must assign SPACE"):
        read_space(tmp_path / "space.py")
    (tmp_path / "space.py").write_text("from ray import tune\nSPACE = {'prune.step': tune.quniform(0.1, 0.2, 0.05)}")
    with pytest.raises(ConfigError, match="of Ray Tune, give choice, uniform, loguniform or randint"):
        read_space(tmp_path / "space.py")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"prune.flops_reduction": {"uniform": [0.1, 0.2]}}, "the same for all trials"),
        ({"model.builder": {"choice": ["a"]}}, "the same for all trials"),
        ({"prune.steps": {"uniform": [0.1, 0.2]}}, r"prune\.steps, which is no key of this run"),
        ({"nothing": {"choice": [1]}}, "nothing, which is no key"),
        ({"prune.step": {"uniform": [0.1, 2.0]}}, r"prune\.step"),
        (
            {"prune.fine_tune_epochs": {"uniform": [1, 3]}},
            r"uniform: \[1, 3\] for prune\.fine_tune_epochs, which does not take what .*for whole numbers give int",
        ),
        ({"train.batch_size": {"loguniform": [32, 128]}}, r"loguniform: \[32, 128\] for train\.batch_size"),
    ],
)
def test_keys_and_values_that_no_run_takes_are_told(space, message):
    with pytest.raises(ConfigError, match=message):
        check_space(space, recipe("resnet20_cifar10"))


def test_settings_go_into_a_config():
    config = with_settings(recipe("resnet20_cifar10"), {"prune.step": 0.05, "seed": 3})
    assert (config.prune.step, config.seed) == (0.05, 3)


def test_a_study_learns_from_earlier_sessions():
    """Twenty trials of an earlier session say that the second choice and high steps are better."""
    space = {"prune.step": {"uniform": [0.0, 1.0]}, "prune.criteria": {"choice": [["l1"], ["cosine"]]}}
    study = Study(space)
    for number in range(20):
        settings = {"prune.step": number / 20, "prune.criteria": [["l1"], ["cosine"]][number % 2]}
        study.add(settings, 50 + number + 20 * (number % 2))
    asked = []
    for number in range(10):
        settings, trial = study.ask(number)
        study.tell(trial, settings, 50 + 20 * settings["prune.step"])
        asked.append(settings)
    assert sum(settings["prune.step"] for settings in asked) / 10 > 0.6
    assert sum(settings["prune.criteria"] == ["cosine"] for settings in asked) >= 7
    settings, trial = study.ask(10)
    study.tell(trial, settings, None)  # a trial that failed teaches nothing


def test_a_session_asks_for_what_the_one_before_would_have_asked_for():
    space = {"train.learning_rate": {"loguniform": [0.01, 1.0]}, "prune.step": {"uniform": [0.0, 1.0]}}
    whole, asked = Study(space), []
    for number in range(8):
        settings, trial = whole.ask(number)
        whole.tell(trial, settings, 50.0 + number)
        asked.append(settings)
    assert len({str(settings) for settings in asked}) == 8
    for cut in (1, 4, 7):
        study = Study(space)
        for number in range(cut):
            study.add(asked[number], 50.0 + number)
        assert study.ask(cut)[0] == asked[cut]


def test_tune_is_what_it_was():
    assert type(tune.randint(1, 4)).__name__ == "Integer"
