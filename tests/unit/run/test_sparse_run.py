"""Whole runs of group sparsity in this process: cut off at every event, on top of a pruned network, and by the job."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import write_pictures
from whole_runs import events_of, on_pictures, power_cut

from laasp_ray import load_pruned, models, prune
from laasp_ray.cli import main as cli
from laasp_ray.config import ExportConfig, ModelConfig
from laasp_ray.errors import ConfigError
from laasp_ray.pruning.sparsity.groups import GroupRule, satisfies
from laasp_ray.run.evaluate import evaluate_run
from laasp_ray.store.artifact import read_arch
from laasp_ray.store.checkpoint import load_checkpoint
from laasp_ray.store.storage import Storage
from laasp_ray.train.trainer import InProcessTrainer

EVENTS = [
    "start",
    "epoch",
    "training_phase",
    "iteration",
    "epoch",
    "training_phase",
    "iteration",
    "epoch",
    "training_phase",
    "finish",
]
SPARSITY = {
    "prune__method": "group_sparsity",
    "prune__group": 8,
    "prune__pruned_per_group": 6,
    "prune__stages": [4, 6],
    "prune__fc_pruned_per_group": [4],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), side=8, train=12, test=3)


def config_of(storage, pictures, **changes):
    tiny = {
        "name": "sparse",
        "train__prune_epoch": 1,
        "train__epochs": 2,
        "train__weight_decay": 0.01,
    }
    if "prune__method" not in changes:
        tiny |= SPARSITY
    return on_pictures(storage, pictures, **(tiny | changes))


def run(config):
    return prune(config, distributed=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, pictures):
    config = config_of(tmp_path_factory.mktemp("undisturbed"), pictures)
    return config, run(config)


def folder_of(config):
    return Storage.open(config.storage).child(config.name).local_path


def test_stages_are_trained_in_between_and_the_last_for_the_rest_of_the_schedule(undisturbed):
    config, _ = undisturbed
    events = events_of(config)
    assert [event.name for event in events] == EVENTS
    assert [event.data["phase"] for event in events if event.name == "training_phase"] == [
        "train",
        "fine-tune",
        "final",
    ]
    first, second = (event.data["details"] for event in events if event.name == "iteration")
    assert (first["prune"]["layer1.0.conv1"], first["prune"]["fc"]) == (4, 2)
    assert (second["prune"]["layer1.0.conv1"], second["prune"]["fc"]) == (6, 4)
    assert second["dense"] == {"conv1": "3 inputs a filter, fewer than the group of 8"}
    # 269,824 weights of convolutions lose a half, then three quarters; fc's 64 x 3 lose a quarter, then a half.
    assert (first["weights"], first["zeros"]) == (269_824 + 192, 134_912 + 48)
    assert (second["weights"], second["zeros"]) == (269_824 + 192, 202_368 + 96)


def test_the_result_is_sparse_and_loads_to_the_same_outputs(undisturbed):
    config, result = undisturbed
    loaded = load_pruned(folder_of(config))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded(images), result.model(images))
    for name, module in loaded.named_modules():
        if name in ("conv1", "fc") or not hasattr(module, "kernel_size"):
            continue
        assert satisfies(module.weight, GroupRule(8, 6)), name
        assert torch.count_nonzero(module.weight) == module.weight.numel() // 4, name
    assert satisfies(loaded.fc.weight, GroupRule(8, 4)) and torch.count_nonzero(loaded.fc.weight) == 96
    trained = load_checkpoint(Storage.open(config.storage).child(config.name), "unpruned").model
    assert not torch.equal(loaded.conv1.weight, trained["conv1.weight"])
    size = (folder_of(config) / "pruned" / "model.safetensors").stat().st_size
    assert result.summary["weights_bytes"] == size < 0.35 * result.summary["weights_bytes_dense"]


def test_the_best_epoch_of_one_is_the_last(undisturbed):
    _, result = undisturbed
    assert result.summary["best"] == {"epoch": 1, "metrics": result.summary["metrics"]}


def test_the_report_is_in_the_runs_folder(undisturbed):
    config, _ = undisturbed
    report = json.loads((folder_of(config) / "sparsity.json").read_text())
    rows = {row["layer"]: row for row in report["layers"]}
    assert len(rows) == 22
    assert rows["conv1"]["reason"] and rows["conv1"]["density"] == 1
    assert (rows["layer3.0.conv2"]["density"], rows["layer3.0.conv2"]["utilisation"]) == (0.25, 1)
    assert rows["layer3.0.conv2"]["utilisation_unstructured"] < 0.5


def test_a_run_cut_off_at_every_event_ends_as_if_it_never_was(undisturbed, tmp_path, pictures, monkeypatch):
    _, result = undisturbed
    config = config_of(tmp_path, pictures)
    for position in range(len(EVENTS)):
        with power_cut(monkeypatch, position):
            run(config)
    again = run(config)
    assert [event.name for event in events_of(config)] == EVENTS
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_on_top_of_a_filter_pruned_network(tmp_path, pictures, monkeypatch):
    changes = {"train__prune_epoch": 0, "train__epochs": 1, "prune__fine_tune_epochs": 0}
    first = config_of(
        tmp_path,
        pictures,
        **changes,
        name="filters",
        prune__method="laasp",
        prune__flops_reduction=0.03,
        search__images=6,
    )
    run(first)
    config = config_of(
        tmp_path,
        pictures,
        **{**changes, "train__prune_epoch": 1, "train__epochs": 2, "train__distill": 0.5, "train__ema": 0.9},
        prune__method="group_sparsity",
        prune__from_run=str(folder_of(first)),
    )
    teachers, set_teacher = [], InProcessTrainer.set_teacher
    monkeypatch.setattr(
        InProcessTrainer, "set_teacher", lambda self, who: teachers.append(who) or set_teacher(self, who)
    )
    result = run(config)
    # The network that was never pruned teaches.
    (teacher,) = teachers
    never_pruned = load_checkpoint(Storage.open(str(folder_of(first))), "unpruned").model
    assert teacher.plan.is_empty and teacher.tensors.keys() == never_pruned.keys()
    assert all(torch.equal(tensor, never_pruned[name]) for name, tensor in teacher.tensors.items())
    # What the first run made is where this one begins: no training up to the prune epoch.
    names = [event.name for event in events_of(config)]
    assert names == ["start", "baseline", "iteration", "epoch", "training_phase", "finish"]
    before, after = load_pruned(folder_of(first)), load_pruned(folder_of(config))
    assert {name: t.shape for name, t in after.state_dict().items()} == {
        name: t.shape for name, t in before.state_dict().items()
    }
    assert read_arch(folder_of(config)).plan == read_arch(folder_of(first)).plan
    assert result.summary["flops_reduction"] >= 0.03
    assert all(
        satisfies(module.weight, GroupRule(8, 6))
        for name, module in after.named_modules()
        if isinstance(module, torch.nn.Conv2d) and name != "conv1"
    )
    # It is compared with the network that was never pruned, not with the one that it began with.
    measured = evaluate_run(folder_of(config), latency=ExportConfig(latency=()))
    unpruned, pruned = measured.unpruned, measured.pruned
    parameters = sum(p.numel() for p in models.build(config.model).parameters())
    assert (unpruned.parameters, pruned.parameters < parameters) == (parameters, True)
    assert pruned.metrics.top1 == result.summary["metrics"]["top1"]
    # Killed just after its first event, a run has not kept that network yet.
    cut = replace(config, name="cut")
    with power_cut(monkeypatch, 1):
        run(cut)
    (folder_of(cut) / "checkpoints" / "unpruned.safetensors").unlink()
    run(cut)
    kept = load_checkpoint(Storage.open(str(folder_of(cut))), "unpruned").model
    assert all(torch.equal(tensor, never_pruned[name]) for name, tensor in kept.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prune__flops_reduction": 0.1},
            r"prune\.flops_reduction is 0\.1, but it is of method laasp or",
        ),
        ({"prune__fine_tune_epochs": 0}, r"prune\.fine_tune_epochs is 0, must be at least 1 with several"),
        (
            {"train__pretrained": "w.pt", "prune__from_run": "runs/x"},
            r"train\.pretrained is 'w\.pt', must be left",
        ),
        ({"prune__grup": 8}, r"unknown config key prune\.grup; did you mean prune\.group"),
        ({"search__reestimate_batchnorm": True}, r"search\.reestimate_batchnorm is True, must be left at False with "),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, pictures, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, pictures, **changes)


def test_a_run_of_another_network_is_refused(undisturbed, tmp_path, pictures):
    theirs, _ = undisturbed
    other = ModelConfig(builder="cifar.resnet32", arguments={"num_classes": 3}, input_shape=(3, 8, 8))
    config = config_of(tmp_path, pictures, model__builder=other.builder, prune__from_run=str(folder_of(theirs)))
    with pytest.raises(ConfigError, match=r"from_run .* has the network .*resnet20.*, this run .*resnet32"):
        run(config)
    assert not (tmp_path / "sparse").exists() or not (tmp_path / "sparse" / "journal").exists()


JOB = {
    "data.format": "folder",
    "data.loader": "torchvision",
    "data.image_size": 8,
    "model.input_shape": [3, 8, 8],
    "model.arguments.num_classes": 3,
    "data.threads": 1,
}
FLAGS = ["--no-ray", "--group", "8", "--prune", "6", "--epochs", "1", "--prune-epoch", "0", "--batch-size", "6"]
NAME = ["--name", "job"]


def arguments(storage, pictures, *more):
    given = [argument for key, value in JOB.items() for argument in ("--set", f"{key}={json.dumps(value)}")]
    return ["resnet20_cifar10", "--data", str(pictures), "--storage", str(storage), *FLAGS, *NAME, *given, *more]


def test_the_job_prints_the_report(tmp_path, pictures, capsys):
    assert cli.sparsify(arguments(tmp_path, pictures, "--fc-prune", "4")) == 0
    out = capsys.readouterr().out
    assert "Run job: finished" in out and "left dense because" in out
    assert "3 inputs a filter, fewer than the group of 8" in out
    assert (tmp_path / "job" / "pruned" / "model.safetensors").is_file()
    # Started again, it says the same of the finished run.
    assert cli.sparsify(arguments(tmp_path, pictures, "--fc-prune", "4")) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prune", "8"], "prune.pruned_per_group is 8, must be from 1 to below prune.group (8)"),
        (["--stages", "2,4"], "prune.stages is (2, 4), must be rising"),
        (["--stages", "2,6", "--epochs-per-stage", "0"], "prune.fine_tune_epochs is 0, must be at least 1"),
        (["--fc-prune", "4,4"], "the network has 1 linear layers with groups of 8 (fc)"),
        (["--from-run", "nowhere"], "nowhere"),
        (["--group", "128", "--prune", "64"], "no layer of the network can be sparse in groups of 128"),
    ],
)
def test_the_job_says_what_is_wrong(tmp_path, pictures, capsys, flags, message):
    assert cli.sparsify(arguments(tmp_path, pictures, *flags)) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "job" / "journal").exists()


def test_flags_that_choose_filters_are_not_for_this_job(capsys):
    for flag in ("--flops-reduction", "--method", "--iterations", "--percent", "--components", "--pooling"):
        with pytest.raises(SystemExit):
            cli.sparsify(["resnet20_cifar10", flag, "1"])
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.sparsify(["resnet20_cifar10", "--stages", "2,x"])
    assert "argument --stages: invalid" in capsys.readouterr().err
