"""Runs without a target: the network is only trained, by the whole schedule."""

import dataclasses

import pytest
import torch
from fakes import Silent
from helpers import small_run, write_digits
from whole_runs import events_of, on_digits, power_cut, read_events_of

from laasp_ray import load_pruned, prune
from laasp_ray.config import ExportConfig
from laasp_ray.errors import ConfigError
from laasp_ray.methods.laasp import Laasp
from laasp_ray.planning.dry_run import Machine, describe
from laasp_ray.planning.workload import Workload, workload_of
from laasp_ray.report.summary import format_summary, summarise
from laasp_ray.run.evaluate import evaluate_run
from laasp_ray.run.preflight import prepare
from laasp_ray.store.artifact import read_arch
from laasp_ray.store.checkpoint import load_checkpoint
from laasp_ray.store.storage import Storage
from laasp_ray.train.speed import TrainingSpeed

THREE_EPOCHS = {
    "train__epochs": 3,
    "train__prune_epoch": 1,
    "train__learning_rate": 0.1,
    "train__drop_epochs": [2],
    "prune__flops_reduction": 0.0,
}
"""At 0.1, 0.1 and 0.02; the prune epoch is 1."""


def base_run(storage, **changes):
    return small_run(storage, **{**THREE_EPOCHS, **changes})


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), side=16, train=60, test=12)


def run(config):
    return prune(config, distributed=False, progress=Silent())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    config = on_digits(tmp_path_factory.mktemp("base"), digits, **THREE_EPOCHS)
    return config, run(config)


def test_the_whole_schedule_is_one_training_phase(trained):
    config, result = trained
    assert [event.name for event in events_of(config)] == ["start", *["epoch"] * 3, "training_phase", "finish"]
    epochs = [event.data for event in events_of(config) if event.name == "epoch"]
    assert [(epoch["phase"], epoch["epoch"]) for epoch in epochs] == [("final", 0), ("final", 1), ("final", 2)]
    assert [epoch["learning_rate"] for epoch in epochs] == pytest.approx([0.1, 0.1, 0.02])
    summary = result.summary
    assert summary["flops_reduction"] == 0 and summary["macs"] == summary["macs_unpruned"]
    tested = [*(epoch["metrics"] for epoch in epochs[:-1]), summary["metrics"]]
    assert summary["best"] in [{"epoch": number, "metrics": metrics} for number, metrics in enumerate(tested)]
    assert summary["best"]["metrics"]["top1"] == max(metrics["top1"] for metrics in tested)


def test_the_network_loads_and_is_evaluated_as_any_other(trained):
    config, result = trained
    folder = f"{config.storage}/{config.name}"
    assert read_arch(folder).plan.is_empty
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(load_pruned(folder)(images), result.model(images))
    found = evaluate_run(folder, latency=ExportConfig(latency=()))
    unpruned, pruned = found.unpruned, found.pruned
    assert found.latency == ()
    assert unpruned.metrics == pruned.metrics and unpruned.macs == pruned.macs
    assert pruned.metrics.top1 == pytest.approx(result.summary["metrics"]["top1"])


def test_the_summary_has_nothing_before_and_no_iterations(trained):
    config, _ = trained
    summary = summarise(read_events_of(config))
    assert summary.before is None and summary.targets == {}
    text = format_summary(summary)
    assert "FLOPs reduction 0.00%" in text and "Iterations" not in text


@pytest.mark.parametrize("position", [3, 5])
def test_a_run_that_is_cut_off_comes_to_the_same_weights(trained, tmp_path, monkeypatch, position):
    config = dataclasses.replace(trained[0], storage=str(tmp_path))
    with power_cut(monkeypatch, position):
        run(config)
    found, expected = run(config), trained[1]
    weights = found.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.model.state_dict().items())
    assert found.summary | {"seconds": 0} == expected.summary | {"seconds": 0}


def test_weights_that_are_given_are_measured_and_trained_on_from_the_prune_epoch(trained, digits, tmp_path):
    weights = f"{trained[0].storage}/{trained[0].name}/pruned/model.safetensors"
    config = on_digits(tmp_path, digits, **THREE_EPOCHS | {"train__pretrained": weights, "train__prune_epoch": 2})
    run(config)
    assert [event.name for event in events_of(config)] == ["start", "baseline", "epoch", "training_phase", "finish"]
    baseline, epoch = (next(e.data for e in events_of(config) if e.name == name) for name in ("baseline", "epoch"))
    assert baseline["metrics"] == trained[1].summary["metrics"]
    assert (epoch["epoch"], epoch["learning_rate"]) == (2, pytest.approx(0.02))
    assert summarise(read_events_of(config)).before is not None
    start = load_checkpoint(Storage.open(config.storage).child(config.name), "unpruned").model
    assert not torch.equal(start["conv1.weight"], trained[1].model.state_dict()["conv1.weight"])


def test_the_plan_of_a_dry_run(tmp_path):
    config = base_run(tmp_path)
    prepared = prepare(config)
    workload = workload_of(prepared)
    assert type(workload) is Workload
    assert (workload.epochs, workload.evaluations) == ({"train": 0, "fine-tune": 0, "final": 3}, 3)
    speed = TrainingSpeed(training=100.0, evaluation=200.0, device="cpu", loader="dali-cpu")
    text = describe(prepared, workload, Machine(workers=1, tasks=1, trainer=speed, forward=1.0))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert {"start from scratch", "pruned nothing, without a target", "final 3 epochs"} <= set(lines)
    given = dataclasses.replace(config, train=dataclasses.replace(config.train, pretrained="weights.pt"))
    workload = workload_of(dataclasses.replace(prepared, config=given))
    assert (workload.epochs["final"], workload.evaluations) == (2, 3)  # the weights given, both epochs


def test_what_chooses_prunes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a method is given to a run that prunes nothing"):
        prune(base_run(tmp_path), distributed=False, method=Laasp())
    with pytest.raises(ConfigError, match=r"prune\.iterations is 3, must be left at 0 without a target"):
        base_run(tmp_path, prune__iterations=3)
    with pytest.raises(ConfigError, match=r"train\.distill is 0\.5, must be left at 0\.0 without a target"):
        base_run(tmp_path, train__distill=0.5)
