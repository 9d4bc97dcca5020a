"""Flags and settings, what bad ones get, and a whole run with its evaluation, in one process."""

import argparse
import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import write_pictures
from safetensors.torch import save_file

from laasp_ray.cli import classes, flags
from laasp_ray.cli import main as cli
from laasp_ray.config import ModelConfig
from laasp_ray.config.methods import known_to
from laasp_ray.errors import ConfigError
from laasp_ray.models import build
from laasp_ray.recipes import RECIPES, recipe

UNTIMED = ("--engines", "none")
CLASSES, TRAIN_IMAGES, TEST_IMAGES = 3, 24, 7
SETTINGS = {
    "model.input_shape": [3, 16, 16],
    "model.arguments.num_classes": CLASSES,
    "data.format": "folder",
    "data.image_size": 16,
    "data.pad": 2,
    "data.threads": 1,
    "data.loader": "torchvision",
    "prune.step": 0.03,
    "prune.fine_tune_every": 0.04,
    "search.batch_size": 10,
    "export.format": "none",
    "export.latency": [],
}
FLAGS = [
    "--flops-reduction",
    "0.05",
    "--prune-epoch",
    "1",
    "--epochs",
    "2",
    "--batch-size",
    "12",
    "--calibration-images",
    "20",
    "--criteria",
    "l1,cosine",
    "--seed",
    "5",
    "--name",
    "little",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 16 x 16 pictures of three classes."""
    return write_pictures(tmp_path_factory.mktemp("images"), side=16, train=TRAIN_IMAGES, test=TEST_IMAGES)


def settings(changes=None, of="laasp"):
    """Arguments that set SETTINGS, but those that are not for the method `of`, and the changes."""
    used = {key: value for key, value in SETTINGS.items() if key[:6] != "prune." or of in known_to(key[6:])}
    return [
        argument
        for key, value in {**used, **(changes or {})}.items()
        for argument in ("--set", f"{key}={json.dumps(value)}")
    ]


def arguments(images, storage, *more, **changes):
    return [
        "resnet20_cifar10",
        "--no-ray",
        "--data",
        str(images),
        "--storage",
        str(storage),
        *FLAGS,
        *settings(changes),
        *more,
    ]


def config_of(*given):
    return flags.overridden(recipe("resnet20_cifar10"), flags.run_parser("prune.py", "").parse_args(list(given)))


def test_every_flag_sets_its_key(tmp_path):
    config = config_of(
        "--data",
        str(tmp_path),
        "--storage",
        "s3://bucket/runs",
        "--pretrained",
        "/weights.safetensors",
        "--workers",
        "3",
        *FLAGS,
    )
    assert (config.data.path, config.storage, config.name) == (str(tmp_path), "s3://bucket/runs", "little")
    assert (config.train.pretrained, config.train.prune_epoch, config.train.epochs) == ("/weights.safetensors", 1, 2)
    assert (config.train.batch_size, config.search.images, config.prune.flops_reduction) == (12, 20, 0.05)
    assert (config.prune.criteria, config.cluster.workers, config.seed) == (("l1", "cosine"), 3, 5)


def started(*given, name="resnet20_cifar10"):
    options = flags.run_parser("prune.py", "").parse_args(list(given))
    return flags.overridden(flags.of_variant(recipe(name), name, options), options)


def test_classes_are_not_taken_from_data_beside_data_or_a_loss_of_one_s_own(capsys):
    for key in ("data.factory", "train.loss"):
        given = ["--set", f"{key}=mine:thing"]
        options = flags.run_parser("prune.py", "").parse_args(given)
        config = recipe("resnet50_imagenet")
        config = replace(config, data=replace(config.data, format="digits"))
        config = flags.overridden(config, options)
        assert classes.with_classes_of_data(config, options) is config
    assert capsys.readouterr().err == ""


def test_a_run_from_trained_weights_is_compensated_unless_the_flags_say_otherwise():
    def procedure(*given, **of):
        config = started(*given, **of)
        return config.prune.criteria, config.prune.compensate, config.prune.reestimate_batchnorm

    pool, weights = ("l1", "l2", "euclidean", "cosine"), ("--pretrained", "/weights.safetensors")
    plain, compensated = (pool, "off", False), ((*pool, "obs"), "full", True)
    assert procedure() == plain
    assert procedure(*weights) == compensated
    assert procedure("--set", "train.pretrained=/weights.safetensors") == compensated
    assert procedure(*weights, "--variant", "paper") == plain
    assert procedure(*weights, "--variant", "2023") == plain
    assert procedure(*weights, "--compensate", "off") == plain
    assert procedure("--variant", "compensated") == compensated
    assert procedure(*weights, "--criteria", "l1", "--compensate", "channels") == (("l1",), "channels", True)
    pls = started(*weights, "--method", "pls").prune
    assert (pls.compensate, pls.reestimate_batchnorm) == ("off", False)
    # A recipe of one's own says itself what it is.
    options = flags.run_parser("prune.py", "").parse_args(list(weights))
    assert flags.of_variant(recipe("resnet20_cifar10"), "mine:small", options).prune.compensate == "off"


def test_the_flags_of_pls():
    given = ["--method", "pls", "--iterations", "9", "--percent", "10", "--components", "3", "--pooling", "max2x2"]
    prune = config_of(*given).prune
    assert (prune.method, prune.iterations, prune.percent) == ("pls", 9, 10.0)
    assert (prune.components, prune.pooling) == (3, "max2x2")


def test_a_target_by_flag_takes_the_place_of_the_recipes_for_flops():
    assert config_of().prune.targets == {"FLOPs": 0.5}
    assert config_of("--parameters-reduction", "0.3").prune.targets == {"parameters": 0.3}
    assert config_of("--latency-reduction", "0.2").prune.targets == {"latency": 0.2}
    both = config_of("--parameters-reduction", "0.3", "--latency-reduction", "0.2", "--flops-reduction", "0.4")
    assert both.prune.targets == {"FLOPs": 0.4, "parameters": 0.3, "latency": 0.2}
    # 0 is no target, and --set has the last word.
    assert config_of("--parameters-reduction", "0").prune.targets == {"FLOPs": 0.5}
    again = config_of("--parameters-reduction", "0.3", "--set", "prune.flops_reduction=0.1")
    assert again.prune.targets == {"FLOPs": 0.1, "parameters": 0.3}
    assert config_of("--set", "prune.parameters_reduction=0.3").prune.targets == {"FLOPs": 0.5, "parameters": 0.3}


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--method", "plsr", r"prune\.method is 'plsr'; did you mean pls\? known: laasp, pls, group_sparsity, or an "),
        ("--iterations", "-1", r"prune\.iterations is -1, must be at least 0"),
        ("--parameters-reduction", "1", r"prune\.parameters_reduction is 1\.0, must be a share between 0 and 1"),
        ("--latency-reduction", "-0.1", r"prune\.latency_reduction is -0\.1, must be a share between 0 and 1"),
        ("--percent", "100", r"prune\.percent is 100\.0, but it is of method pls, and this run's is laasp"),
        ("--components", "0", r"prune\.components is 0, must be at least 1"),
        ("--pooling", "2x2", r"prune\.pooling is '2x2', must be 'max' or 'avg'"),
        ("--pooling", "max0x2", r"prune\.pooling is 'max0x2'"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flag, value, message):
    with pytest.raises(ConfigError, match=message):
        config_of(flag, value)


def test_without_flags_the_recipe_stands_but_for_its_path_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours, theirs = config_of().to_dict(), recipe("resnet20_cifar10").to_dict()
    assert ours["data"].pop("path") == str(tmp_path / theirs["data"].pop("path"))
    assert ours.pop("storage") == str(tmp_path / theirs.pop("storage")) == str(tmp_path / "runs")
    assert ours == theirs


def test_relative_paths_are_meant_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = config_of("--data", "images", "--pretrained", "~/weights.pt")
    assert config.data.path == str(tmp_path / "images")
    assert config.train.pretrained == str(tmp_path / "home" / "weights.pt")
    assert config_of("--set", "data.path=images").data.path == str(tmp_path / "images")
    assert config_of("--set", "data.path=null", "--set", "data.format=digits").data.path is None


@pytest.mark.parametrize("given", ["runs", "below/runs"])
def test_a_submitted_jobs_relative_storage_goes_to_the_home_folder_and_is_told(tmp_path, monkeypatch, capsys, given):
    """Its working directory is a folder of Ray's that is removed some day."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert config_of("--storage", given).storage == str(tmp_path / "laasp_ray" / given)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"kept in {tmp_path}/laasp_ray/{given}" in told and "s3://" in told


@pytest.mark.parametrize("given", ["/shared/runs", "s3://bucket/runs", "~/runs"])
def test_a_submitted_jobs_storage_that_says_where_it_is_stays_there(tmp_path, monkeypatch, capsys, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert config_of("--storage", given).storage == given.replace("~", str(tmp_path))
    assert capsys.readouterr().err == ""


def test_names_of_weights_are_no_paths():
    assert config_of("--pretrained", "torchvision:IMAGENET1K_V2").train.pretrained == "torchvision:IMAGENET1K_V2"


def test_a_variant_of_a_recipe(capsys, monkeypatch):
    chosen = []

    def noted(config, **options):
        chosen.append(config)
        return ""

    monkeypatch.setattr(cli, "dry_run", noted)
    given = ["resnet56_cifar10", "--variant", "2023", "--data", "/images", "--storage", "/runs", "--dry-run"]
    assert cli.prune(given) == 0
    assert cli.prune_resnet50(["--variant", "paper", "--storage", "/runs", "--dry-run"]) == 0
    assert [config.name for config in chosen] == ["resnet56_cifar10-2023", "resnet50_digits-paper"]
    assert (chosen[0].prune, chosen[1].prune) == (
        recipe("resnet56_cifar10", "2023").prune,
        recipe("resnet50_digits", "paper").prune,
    )
    assert cli.prune(["vgg16_cifar10", "--variant", "2023"]) == 2
    assert "the recipe vgg16_cifar10 has no variant '2023'" in capsys.readouterr().err


def test_values_are_json_or_else_words():
    config = config_of(
        "--set",
        "prune.step=0.02",
        "--set",
        "train.drop_epochs=[3, 5]",
        "--set",
        "data.format=parquet",
        "--set",
        "train.nesterov=false",
        "--set",
        'prune.ignored=["fc"]',
        "--set",
        "model.arguments.num_classes=7",
        "--set",
        "storage=s3://bucket?a=b",
    )
    assert (config.prune.step, config.train.drop_epochs, config.data.format) == (0.02, (3, 5), "parquet")
    assert (config.train.nesterov, config.prune.ignored, config.storage) == (False, ("fc",), "s3://bucket?a=b")
    assert config.model.arguments == {"num_classes": 7}


def test_a_later_setting_wins_over_flags_and_earlier_ones():
    assert config_of("--seed", "1", "--set", "seed=2", "--set", "seed=3").seed == 3


def test_one_criterion_or_several_and_an_import_path():
    assert config_of("--criteria", "l2").prune.criteria == ("l2",)
    assert config_of("--criteria", "l2,mine.of:weights").prune.criteria == ("l2", "mine.of:weights")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("prune.stepp=0.02", r"unknown config key prune\.stepp; did you mean prune\.step\?"),
        ("sede=1", r"unknown config key sede; did you mean seed\?"),
        ("prun.step=0.02", r"unknown config key prun\.step: 'prun' is no section; sections: cluster, data, .*, train"),
        ("seed.x=1", r"unknown config key seed\.x: 'seed' is no section"),
        ("prune.step", r"--set 'prune\.step' has no '=': write --set KEY=VALUE"),
        ("prune.step=much", r"prune\.step is 'much'"),
        ("train.epochs=2.5", r"train\.epochs is 2\.5"),
        ("prune.step=NaN", r"prune\.step is nan, must be a finite number"),
        ("train=5", r"train is 5, must be a mapping"),
        ("data=null", r"data is None, must be a mapping"),
        ("data.path=5", r"data\.path is 5, must be of type str"),
        ("train.pretrained=[1]", r"train\.pretrained is \[1\], must be of type str"),
        ('train={"epochs": 3}', r"config key train\.prune_epoch is missing"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(assignment, message):
    with pytest.raises(ConfigError, match=message):
        config_of("--set", assignment)


def refused(given, capsys):
    """The message on stderr of a command that is refused."""
    assert cli.prune(given) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("error: ") == 1 and "Traceback" not in output.err
    return output.err


def test_no_such_data_path(images, tmp_path, capsys):
    message = refused(arguments(tmp_path / "nowhere", tmp_path / "runs"), capsys)
    assert f"no data set at {tmp_path / 'nowhere'}" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", ""], "--data is empty"),
        (["--data", " "], "--data is empty"),
        (["--set", "data.path="], "--data is empty"),
        (["--data", "~nosuchuser/images"], "--data '~nosuchuser/images': there is no such user's home here"),
        (["--storage", "~nosuchuser"], "storage '~nosuchuser': there is no such user's home here"),
        (["--pretrained", ""], "train.pretrained is empty"),
        (["--pretrained", "~nosuchuser/w.pt"], "train.pretrained '~nosuchuser/w.pt': there is no such user's home"),
    ],
)
def test_a_path_of_nothing_or_of_nobody(capsys, given, message):
    assert message in refused(["resnet20_cifar10", "--no-ray", "--dry-run", *given], capsys)


@pytest.mark.parametrize("format", ["auto", "folder"])
def test_no_class_folders(tmp_path, capsys, format):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    message = refused(arguments(tmp_path / "empty", tmp_path / "runs", **{"data.format": format}), capsys)
    assert f"looked for class folders ({tmp_path}/empty/train/<class>/*.JPEG)" in message or (
        f"looked for {tmp_path}/empty/train/<class>/*.JPEG" in message
    )


def test_unknown_recipe(capsys):
    message = refused(["resnet20_cifar", "--no-ray"], capsys)
    assert "unknown recipe 'resnet20_cifar': did you mean resnet20_cifar10? known recipes: " in message
    assert ", ".join(sorted(RECIPES)) in message


def test_unknown_criterion(images, tmp_path, capsys):
    message = refused(arguments(images, tmp_path, "--criteria", "l1,l3"), capsys)
    assert "unknown criterion 'l3'" in message
    assert all(name in message for name in ("l1", "l2", "euclidean", "cosine"))


@pytest.mark.parametrize("target", ["1", "-0.1", "1.5", "53.8"])
def test_target_outside_0_to_1(images, tmp_path, capsys, target):
    message = refused(arguments(images, tmp_path, f"--flops-reduction={target}"), capsys)
    assert f"prune.flops_reduction is {float(target)!r}, must be a share between 0 and 1" in message


def test_target_beyond_what_the_limits_allow(images, tmp_path, capsys):
    message = refused(arguments(images, tmp_path, "--flops-reduction", "0.99"), capsys)
    assert "prune.flops_reduction is 0.99, but with prune.max_pruned 0.75 and 2" in message
    reachable = float(message.partition("at most ")[2].split()[0])
    assert 0.75 < reachable < 0.99


def test_a_checkpoint_whose_keys_do_not_fit(images, tmp_path, capsys):
    state = build(ModelConfig(builder="cifar.resnet20", arguments={"num_classes": CLASSES})).state_dict()
    state["head.weight"] = state.pop("fc.weight")
    state["conv1.weight"] = state["conv1.weight"][:8].contiguous()
    weights = tmp_path / "weights.safetensors"
    save_file(state, weights)
    message = refused(arguments(images, tmp_path, "--pretrained", str(weights)), capsys)
    assert f"the weights in {weights} do not fit the network" in message
    assert "1 missing (fc.weight)" in message and "1 unexpected (head.weight)" in message
    assert "1 of another shape (conv1.weight: (8, 3, 3, 3) in the file, (16, 3, 3, 3) in the network)" in message


def test_a_checkpoint_that_is_not_there(images, tmp_path, capsys):
    assert f"no file of weights at {tmp_path}/none.pt" in refused(
        arguments(images, tmp_path, "--pretrained", str(tmp_path / "none.pt")), capsys
    )


@pytest.mark.parametrize("below", ["file", "file/runs"])
def test_a_store_that_cannot_be_written(images, tmp_path, capsys, below):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(arguments(images, tmp_path / below), capsys)


def test_unknown_config_key(images, tmp_path, capsys):
    message = refused(arguments(images, tmp_path, "--set", "search.image=3"), capsys)
    assert "unknown config key search.image; did you mean search.images?" in message


def test_a_network_of_another_number_of_classes(images, tmp_path, capsys):
    message = refused(arguments(images, tmp_path, **{"model.arguments.num_classes": 5}), capsys)
    assert "the network has 5 outputs, the training data 3 classes" in message


def test_batches_too_small_for_batchnorm(images, tmp_path, capsys):
    train = [f"{name}.png" for name in range(3)]
    small = tmp_path / "small"
    for split in ("train", "val"):
        for number, name in enumerate(train):
            (small / split / "abc"[number]).mkdir(parents=True)
            source = images / "train" / "abc"[number] / f"{number:03d}.png"
            (small / split / "abc"[number] / name).write_bytes(source.read_bytes())
    assert "with 3 training images, train.batch_size 2 and 1 workers" in refused(
        arguments(small, tmp_path / "runs", "--batch-size", "2"), capsys
    )


def test_a_sparse_recipe_has_no_target_for_flops_not_even_none():
    only = {flag: flags.FLAGS[flag] for flag in ("--flops-reduction", "--method")}

    def config(method=None):
        given = argparse.Namespace(flags=only, flops_reduction=0.0, method=method, set=[])
        return flags.overridden(recipe("mobilenet_v1_aap"), given)

    with pytest.raises(ConfigError, match=r"prune\.flops_reduction is 0\.0, but it is of method laasp or pls, "):
        config()
    assert not config("laasp").prunes and config("laasp").prune.fine_tune_epochs == 5


def test_a_flag_of_another_job_is_not_taken_for_the_beginning_of_one(capsys):
    with pytest.raises(SystemExit):
        cli.prune(["resnet50_aap", "--prune", "6"])  # not --prune-epoch
    assert "unrecognized arguments: --prune 6" in capsys.readouterr().err


def test_a_flag_that_is_not_a_number_is_argparses_to_refuse(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.prune(["resnet20_cifar10", "--epochs", "many"])
    assert ended.value.code == 2
    assert "--epochs" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The folder of a run through the command line, with what it printed."""
    storage, printed = tmp_path_factory.mktemp("runs"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.prune(arguments(images, storage)) == 0
    return storage / "little", printed.getvalue()


def test_a_run_prints_its_summary_and_where_the_network_is(finished):
    folder, printed = finished
    metrics = json.loads((folder / "pruned" / "metrics.json").read_text())
    assert printed.splitlines()[-1] == f"pruned network: {folder}/pruned"
    assert metrics["flops_reduction"] >= 0.05
    for figure in (f"{metrics['macs']:,}", f"{metrics['metrics']['top1']:.2%}"):
        assert figure in printed
    events = [path.stem.partition("-")[2] for path in sorted((folder / "journal").glob("[0-9]*.json"))]
    assert events[0] == "start" and events[-1] == "finish" and events.count("iteration") >= 2


def test_its_config_is_what_the_flags_said(finished, images):
    config = json.loads((finished[0] / "config.json").read_text())
    assert config["data"]["path"] == str(images)
    assert (config["train"]["epochs"], config["prune"]["criteria"], config["seed"]) == (2, ["l1", "cosine"], 5)


def test_the_same_command_again_does_nothing_and_prints_the_same(finished, images, capsys):
    folder, printed = finished
    before = sorted((folder / "journal").iterdir())
    assert cli.prune(arguments(images, folder.parent)) == 0
    assert capsys.readouterr().out == printed
    assert sorted((folder / "journal").iterdir()) == before


def test_another_config_under_its_name_is_refused(finished, images, capsys):
    message = refused(arguments(images, finished[0].parent, "--seed", "6"), capsys)
    assert "was started with another config (seed: 5 there, 6 here)" in message


def test_repeats_are_runs_of_their_own_with_mean_and_spread(finished, images, tmp_path, capsys):
    given = arguments(images, tmp_path, "--repeats", "2")
    assert cli.prune(given) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "little-repeats.json").read_text())
    assert list(content["runs"]) == ["little-seed5", "little-seed6"]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in content["runs"]]
    assert [(config["seed"], config["name"]) for config in configs] == [(5, "little-seed5"), (6, "little-seed6")]
    measured = [json.loads((tmp_path / name / "pruned" / "metrics.json").read_text()) for name in content["runs"]]
    losses = [metrics["metrics"]["loss"] for metrics in measured]
    assert [run["loss"] for run in content["runs"].values()] == losses
    # The same seed alone comes to the same.
    alone = json.loads((finished[0] / "pruned" / "metrics.json").read_text())
    assert losses[0] == alone["metrics"]["loss"] != losses[1]
    assert content["spread"]["loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert content["spread"]["loss"]["std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert printed.splitlines()[-1] == f"2 runs: {tmp_path}/little-repeats.json"
    # Again, with one more: those that are done are left alone.
    before = sorted((tmp_path / "little-seed5" / "journal").iterdir())
    assert cli.prune(arguments(images, tmp_path, "--repeats", "3")) == 0
    assert sorted((tmp_path / "little-seed5" / "journal").iterdir()) == before
    content = json.loads((tmp_path / "little-repeats.json").read_text())
    assert [run["loss"] for run in content["runs"].values()][:2] == losses and len(content["runs"]) == 3


def test_a_dry_run_prints_its_plan_and_leaves_nothing(images, tmp_path, capsys):
    assert cli.prune(arguments(images, tmp_path / "runs", "--repeats", "2", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "Dry run of little" in printed and "5.00% of FLOPs" in printed and "2 runs" in printed
    assert "42 proposals an iteration" in printed  # 21 convolutions, 2 criteria
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("job", "more", "said"),
    [
        (cli.sparsify, ["--group", "8", "--prune", "6", "--stages", "4,6"], "stage 2          6 of 8 in 20 layers"),
        (cli.prune, ["--method", "pls", "--iterations", "1"], "about 1: 50.00% of FLOPs"),
        (cli.prune, ["--criteria", "l1,pls"], "42 proposals an iteration"),
    ],
)
def test_a_dry_run_of_every_kind_of_run(images, tmp_path, capsys, job, more, said):
    given = ["resnet20_cifar10", "--no-ray", "--data", str(images), "--storage", str(tmp_path / "runs"), "--dry-run"]
    method = "group_sparsity" if job is cli.sparsify else "pls" if "pls" in more else "laasp"
    assert job([*given, "--batch-size", "12", *more, *settings(of=method)]) == 0
    printed = capsys.readouterr().out
    assert said in printed and "time, all" in printed
    assert not (tmp_path / "runs").exists()


def test_evaluation_prints_a_table_and_writes_the_figures(finished, images, tmp_path, capsys):
    folder, _ = finished
    out = tmp_path / "figures.json"
    timed = ["--engines", "eager", "--latency-batch", "1", "2"]
    assert cli.evaluate([str(folder), "--batch-size", "3", *timed, "--json", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["unpruned", "pruned", "pruned", "/", "unpruned"]
    labels = ["top-1", "top-5", "loss", "MACs", "parameters"]
    assert [line[: len(label)] for line, label in zip(printed[1:], labels, strict=False)] == labels
    assert printed[6] == f"{TEST_IMAGES} test images; MACs: convolutions and linear layers at one input"
    assert printed[8].startswith("latency, ms (10th to 90th percentile)")
    assert [line.split()[0] for line in printed[10:12]] == ["eager", "eager"]
    assert printed[12].startswith("Forward passes by turns on cpu, ")
    figures, recorded = json.loads(out.read_text()), json.loads((folder / "pruned" / "metrics.json").read_text())
    assert figures.keys() == {"unpruned", "pruned", "latency"}
    assert figures["pruned"]["macs"] == recorded["macs"]
    assert figures["unpruned"]["macs"] == recorded["macs_unpruned"]
    assert figures["pruned"]["parameters"] == recorded["parameters"] < figures["unpruned"]["parameters"]
    # Measured again, from the files: what the run itself measured at its end.
    assert figures["pruned"]["metrics"]["top1"] == recorded["metrics"]["top1"]
    assert figures["pruned"]["metrics"]["loss"] == pytest.approx(recorded["metrics"]["loss"], abs=1e-5)
    assert figures["pruned"]["metrics"]["images"] == TEST_IMAGES
    assert figures["pruned"]["metrics"]["top5"] == 1.0  # of three classes
    assert [(row["engine"], row["batch_size"]) for row in figures["latency"]] == [("eager", 1), ("eager", 2)]
    assert all(row[of]["median_ms"] > 0 for row in figures["latency"] for of in ("unpruned", "pruned"))
    assert f"{figures['pruned']['macs'] / figures['unpruned']['macs']:.3f}" in printed[4]


def test_evaluation_on_other_data(finished, images, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train").symlink_to(images / "train")
    (tmp_path / "other" / "val").symlink_to(images / "train")
    # A folder may be given by its address, too.
    assert cli.evaluate([f"file://{finished[0]}", "--data", str(tmp_path / "other"), *UNTIMED]) == 0
    assert f"{TRAIN_IMAGES} test images" in capsys.readouterr().out


def test_evaluation_needs_the_test_images_alone(finished, images, tmp_path, capsys):
    recorded = json.loads((finished[0] / "pruned" / "metrics.json").read_text())["metrics"]
    (tmp_path / "other" / "val").mkdir(parents=True)
    for name in ("a", "c"):  # no image of b: what a class is called says its number, not its place among those there
        (tmp_path / "other" / "val" / name).symlink_to(images / "val" / name)
    out = tmp_path / "figures.json"
    assert cli.evaluate([str(finished[0]), "--data", str(tmp_path / "other"), "--json", str(out), *UNTIMED]) == 0
    parts = [json.loads(out.read_text())["pruned"]["metrics"]]
    (tmp_path / "b" / "val").mkdir(parents=True)
    (tmp_path / "b" / "val" / "b").symlink_to(images / "val" / "b")
    assert cli.evaluate([str(finished[0]), "--data", str(tmp_path / "b"), "--json", str(out), *UNTIMED]) == 0
    parts.append(json.loads(out.read_text())["pruned"]["metrics"])
    counts = [part["images"] for part in parts]
    assert sum(counts) == TEST_IMAGES == recorded["images"]
    for figure in ("loss", "top1"):
        whole = sum(part[figure] * count for part, count in zip(parts, counts, strict=True)) / TEST_IMAGES
        assert whole == pytest.approx(recorded[figure], abs=1e-5)


def test_evaluation_goes_by_the_journal_if_the_config_is_lost(finished, images, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    assert cli.evaluate([str(tmp_path / "run"), "--data", str(images), *UNTIMED]) == 0
    assert f"{TEST_IMAGES} test images" in capsys.readouterr().out


def test_evaluation_on_data_of_other_classes(finished, images, tmp_path, capsys):
    shutil.copytree(images / "train", tmp_path / "train")
    shutil.copytree(next((images / "train").iterdir()), tmp_path / "train" / "zebra")
    (tmp_path / "val").symlink_to(tmp_path / "train")
    assert cli.evaluate([str(finished[0]), "--data", str(tmp_path)]) == 2
    assert "1 class folders that the training images do not have (zebra)" in capsys.readouterr().err
    assert cli.evaluate([str(finished[0]), "--data", ""]) == 2
    assert "--data is empty" in capsys.readouterr().err


def test_evaluation_of_a_folder_that_is_no_runs(tmp_path, capsys):
    assert cli.evaluate([str(tmp_path)]) == 2
    assert f"{tmp_path} holds no config.json: give the folder of a run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert cli.evaluate([str(tmp_path)]) == 2
    assert f"config.json in {tmp_path} is damaged: it is not JSON" in capsys.readouterr().err


def test_evaluation_with_nowhere_to_write_the_figures_is_refused_before_measuring(finished, tmp_path, capsys):
    assert cli.evaluate([str(finished[0]), "--json", str(tmp_path / "none" / "figures.json")]) == 2
    output = capsys.readouterr()
    assert output.out == "" and f"there is no folder {tmp_path / 'none'}" in output.err


def test_evaluation_of_a_run_that_is_not_finished(finished, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    assert cli.evaluate([str(tmp_path)]) != 0
    error = capsys.readouterr().err
    assert "error: " in error and str(tmp_path) in error


@pytest.mark.parametrize("option", ["--batch-size", "--latency-batch"])
def test_evaluation_in_batches_of_nothing(finished, capsys, option):
    with pytest.raises(SystemExit) as ended:
        cli.evaluate([str(finished[0]), option, "0"])
    assert ended.value.code == 2
    assert option in capsys.readouterr().err


def test_resnet50_says_what_it_does_without_data(monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(cli, "_prune", lambda options, base: chosen.append(base(options).name))
    assert cli.prune_resnet50([]) == 0
    assert (
        "No --data given: pruning ResNet-50 on the embedded handwritten digits (1,797 real images)"
        in capsys.readouterr().err
    )
    assert cli.prune_resnet50(["--data", str(Path("somewhere"))]) == 0
    assert capsys.readouterr().err == ""
    assert chosen == ["resnet50_digits", "resnet50_imagenet"]


def test_the_number_of_classes_is_taken_from_the_data_and_said(images, tmp_path, capsys):
    given = list(arguments(images, tmp_path, "--dry-run"))
    position = given.index(f"model.arguments.num_classes={CLASSES}")
    del given[position - 1 : position + 1]
    assert cli.prune(given) == 0
    assert f"{images} have 3 classes, the recipe 10: the network is built for 3" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--set", "model.arguments.num_classes=5"], ["--pretrained", "/weights.pt"]])
def test_a_number_of_classes_that_the_user_decides_stays(images, given):
    options = flags.run_parser("prune.py", "").parse_args(["--data", str(images), *given])
    config = flags.overridden(recipe("resnet20_cifar10"), options)
    assert classes.with_classes_of_data(config, options) is config


def test_data_that_cannot_be_opened_are_left_to_whoever_needs_them(tmp_path):
    options = flags.run_parser("prune.py", "").parse_args(["--data", str(tmp_path / "nowhere")])
    config = flags.overridden(recipe("resnet20_cifar10"), options)
    assert classes.with_classes_of_data(config, options) is config
