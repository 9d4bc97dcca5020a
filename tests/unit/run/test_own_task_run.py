"""Whole runs with data, loss and metrics of the user's own, in this process: racing, resume, moments, distillation."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import own_examples
import pytest
import torch
from fakes import Silent
from own_examples import bce, config_of, data, network, right
from torch.utils.data import TensorDataset
from whole_runs import events_of, power_cut, read_events_of

from laasp_ray import load_pruned, prune
from laasp_ray.cli import main as cli
from laasp_ray.config import ExportConfig, PlsConfig
from laasp_ray.errors import ConfigError, DataError
from laasp_ray.planning.dry_run import dry_run
from laasp_ray.records import Metrics
from laasp_ray.report.evaluation import evaluation_table
from laasp_ray.report.summary import format_summary, summarise
from laasp_ray.run.evaluate import evaluate_run
from laasp_ray.run.events import EpochDone, IterationDone, RunFinished, RunStarted, event_from, last_of
from laasp_ray.tasks import OwnData, task_of


def run(config, **given):
    return prune(config, distributed=False, progress=Silent(), **given)


def decisions_of(config):
    return [event.decision for event in read_events_of(config) if isinstance(event, IterationDone)]


def weights_of(result):
    return {name: tensor.clone() for name, tensor in result.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything by import path, and its result."""
    config = config_of(tmp_path_factory.mktemp("runs"))
    return config, run(config)


def test_a_run_by_import_paths(whole):
    config, result = whole
    events = read_events_of(config)
    start, finish = last_of(events, RunStarted), last_of(events, RunFinished)
    assert start.task["loss"] == "own_examples:bce" and start.task["data"]["factory"] == "own_examples:data"
    assert start.images["train"]["images"] == start.train_images == 24 and start.test_images == 10
    assert finish.flops_reduction >= 0.3 and decisions_of(config)
    epochs = [event for event in events if isinstance(event, EpochDone)]
    assert [event.top1 for event in epochs] == [None] * len(epochs)
    metrics = finish.metrics
    assert list(metrics.values) == ["right", "wrong"] and metrics.top1 is None and metrics.images == 10
    assert metrics.values["right"] + metrics.values["wrong"] == pytest.approx(1)
    stored = json.loads((config_path(config) / "pruned" / "metrics.json").read_text())
    assert stored["metrics"]["values"] == dict(metrics.values)
    assert same(load_pruned(config_path(config), network()).state_dict(), result.model.state_dict())


def config_path(config):
    return Path(config.storage) / config.name


def test_examples_are_not_called_images(whole, tmp_path):
    config, _ = whole
    events = read_events_of(config)
    table = evaluation_table(evaluate_run(config_path(config), trust=True, latency=UNTIMED))
    assert "10 test examples; MACs" in table and "images" not in table
    assert re.search(r"^test examples +10 +10$", format_summary(summarise(events)), re.MULTILINE)
    plan = dry_run(config_of(tmp_path), distributed=False)
    assert re.search(r"^examples +24 to train on, 10 to test on$", plan, re.MULTILINE)
    assert "on the test examples" in plan and "test images" not in plan


def test_a_loss_that_runs_images_is_of_images(whole):
    start = read_events_of(whole[0])[0]
    data = {**start.config["data"], "factory": ""}
    assert summarise([dataclasses.replace(start, config={**start.config, "data": data})]).noun == "images"


def test_the_losses_of_decisions_are_those_of_the_loss(whole):
    """The loss after the last prune is the mean of bce over the calibration set, with the pruned network."""
    config, _ = whole
    first = decisions_of(config)[0]
    assert 0 < first.loss < 2 and first.loss_before > 0
    assert events_of(config)[0].data["config"]["train"]["loss"] == "own_examples:bce"


def test_python_objects_decide_the_same(whole, tmp_path):
    config, expected = whole
    given = config_of(tmp_path, train__loss="", train__metrics={}, data__factory="given")
    metrics = {"right": right, "wrong": own_examples.WRONG}
    result = run(given, model=network(), data=OwnData(data), loss=bce, metrics=metrics)
    assert same(weights_of(result), weights_of(expected)) and decisions_of(given) == decisions_of(config)
    assert result.summary["metrics"] == expected.summary["metrics"]
    assert events_of(given)[0].data["config"]["train"]["loss"] == "given"


def test_reading_processes_change_nothing(whole, tmp_path):
    assert same(weights_of(run(config_of(tmp_path, data__workers=2))), weights_of(whole[1]))


def test_a_loss_that_runs_the_network_decides_the_same(whole, tmp_path):
    """Its candidates are measured on pruned copies, whose losses differ by rounding only."""
    config, expected = whole
    other = config_of(tmp_path, train__loss="own_examples:bce_of_model")
    result = run(other)
    ours, theirs = decisions_of(other), decisions_of(config)
    assert [one.prunes for one in ours] == [one.prunes for one in theirs]
    assert [one.loss for one in ours] == pytest.approx([one.loss for one in theirs], rel=1e-5)
    assert result.summary["metrics"]["values"] == expected.summary["metrics"]["values"]


EXHAUSTIVE = pytest.mark.exhaustive


@pytest.mark.parametrize("position", [3, *(pytest.param(place, marks=EXHAUSTIVE) for place in (1, 2, 4, 5, 6, 7))])
def test_a_run_cut_off_goes_on_to_the_same_weights(whole, tmp_path, monkeypatch, position):
    config, expected = config_of(tmp_path), whole[1]
    assert position < len(events_of(whole[0]))
    with power_cut(monkeypatch, position):
        run(config)
    assert same(weights_of(run(config)), weights_of(expected))


@pytest.mark.exhaustive
def test_racing_compensation_and_statistics_work_on_it(tmp_path):
    for name, loss in {"outputs": "bce", "model": "bce_of_model"}.items():
        config = config_of(
            tmp_path,
            train__loss=f"own_examples:{loss}",
            prune__compensate="full",
            search__racing="on",
            search__reestimate_batchnorm=True,
        )
        config = dataclasses.replace(config, name=name)
        assert run(config).summary["flops_reduction"] >= 0.3
        assert all(decision.loss > 0 for decision in decisions_of(config))


class Imitated:
    def __call__(self, outputs, targets):
        return bce(outputs, targets)

    def distillation(self, outputs, teacher, targets):
        return (outputs - teacher).square().mean(1)


def test_distillation_trains_other_weights(whole, tmp_path):
    config = config_of(tmp_path, train__loss="", train__distill=0.5)
    result = run(config, loss=Imitated())
    assert not same(weights_of(result), weights_of(whole[1]))
    assert decisions_of(config)[0].prunes == decisions_of(whole[0])[0].prunes


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        (
            {},
            {"loss": Imitated()},
            r"started with another task \(loss: test_own_task_run:Imitated \w+ there, own_examples:",
        ),
        (
            {},
            {"loss": lambda outputs, targets: 2 * bce(outputs, targets)},
            r"loss: test_own_task_run:<lambda> \w+ there, own_examples:bce here",
        ),
        ({"metrics": {"other": right}}, {"loss": bce}, r"metrics\.other: none there, laasp_ray\.tasks\.metrics:Mean"),
        ({"data": functools.partial(data, count=23)}, {"loss": bce}, r"data\.factory: own_examples:data there"),
    ],
)
def test_a_resumed_run_refuses_another_task(tmp_path, monkeypatch, changes, given, message):
    config = config_of(tmp_path, train__loss="", train__metrics={}, data__factory="given")
    first = {"data": data, "loss": given["loss"], "metrics": {"right": right}}
    with power_cut(monkeypatch, 2):
        run(config, **first)
    again = first | {"loss": bce} | changes
    with pytest.raises(ConfigError, match=message):
        run(config, **again)
    if not changes:
        assert run(config, **first).summary["flops_reduction"] >= 0.3


def test_a_resumed_run_refuses_other_examples(tmp_path, monkeypatch):
    config = config_of(tmp_path, train__loss="", train__metrics={}, data__factory="given")
    with power_cut(monkeypatch, 2):
        run(config, data=data, loss=bce)
    monkeypatch.setattr(own_examples.Noise, "__getitem__", lambda self, index: (torch.zeros(2, 6, 8), torch.zeros(3)))
    with pytest.raises(DataError, match=r"the train data are not those that the run began with"):
        run(config, data=data, loss=bce)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune__criteria": ("l1", "pls")}, r"pls looks at the images' class labels"),
        ({"prune": PlsConfig(flops_reduction=0.1)}, r"pls looks at .* class labels.*attribute `responses`"),
        ({"train__loss": "own_examples:right", "train__distill": 0.1}, r"train\.distill is 0\.1, but the loss right"),
        ({"data__collate": "own_examples:nothing"}, r"data\.collate 'own_examples:nothing' cannot be imported"),
        ({"model__input_shape": (2, 8, 8)}, r"inputs of shape \(2, 2, 6, 8\)"),
        ({"train__batch_size": 4, "data__arguments": {"count": 0}}, r"gave no train examples"),
    ],
)
def test_what_is_refused_before_anything_is_stored(tmp_path, changes, message):
    if "prune" in changes:
        config = dataclasses.replace(config_of(tmp_path), **changes)
    else:
        config = config_of(tmp_path, **changes)
    with pytest.raises((ConfigError, DataError), match=message):
        run(config)
    assert not events_of(config)


class WithResponses:
    """The loss `bce`, whose responses are its targets."""

    def __call__(self, outputs, targets):
        return bce(outputs, targets)

    def responses(self, targets):
        return targets


class WrongResponses(WithResponses):
    def responses(self, targets):
        return targets.tolist()


def test_pls_scores_filters_by_the_responses_of_the_loss(tmp_path):
    """As a criterion of the pool, and as a method, whose first choice is the same as VIP's by hand."""
    config = config_of(tmp_path, prune__criteria=("l1", "pls"), train__loss="", train__metrics={})
    result = run(config, model=network(), loss=WithResponses())
    assert result.summary["flops_reduction"] >= 0.3
    pls = PlsConfig(flops_reduction=0.2, percent=25.0, iterations=1)
    config = dataclasses.replace(config, name="method", prune=pls)
    run(config, model=network(), loss=WithResponses())
    assert decisions_of(config)[0].criterion == "pls"


def test_pls_takes_classes_of_own_data(tmp_path):
    def classes(split):
        return TensorDataset(torch.randn(12, *own_examples.SHAPE), torch.arange(12) % 3)

    config = config_of(tmp_path, prune__criteria=("pls",), train__loss="", train__metrics={}, data__factory="given")
    torch.manual_seed(0)
    data_of = {split: classes(split) for split in ("train", "test")}
    assert run(config, model=network(), data=OwnData(data_of.__getitem__)).summary["flops_reduction"] >= 0.3


def test_responses_that_are_no_numbers_are_refused(tmp_path):
    config = config_of(tmp_path, prune__criteria=("pls",), train__loss="", train__metrics={})
    with pytest.raises(ConfigError, match=r"`responses` of the loss WrongResponses gave list, must give numbers"):
        run(config, model=network(), loss=WrongResponses())
    assert not events_of(config)


def test_evaluate_runs_code_of_the_folder_only_if_it_is_trusted(whole):
    config, _ = whole
    with pytest.raises(ConfigError, match=r"by import path, 'own_examples:network'"):
        evaluate_run(config_path(config))
    measured = evaluate_run(config_path(config), trust=True, latency=UNTIMED)
    unpruned, pruned = measured.unpruned, measured.pruned
    assert pruned.metrics == last_of(read_events_of(config), RunFinished).metrics
    assert pruned.macs < unpruned.macs and set(unpruned.metrics.values) == {"right", "wrong"}
    assert re.search(r"^right +0\.\d{4} +0\.\d{4}$", evaluation_table(measured), re.MULTILINE)


def given_task(config, **objects):
    return task_of(config_of(config.storage, train__loss="", train__metrics={}), **objects)


UNTIMED = ExportConfig(latency=())


def test_evaluate_takes_the_run_s_own_task_as_objects_and_other_data(whole):
    config, _ = whole
    metrics = {"right": right, "wrong": own_examples.WRONG}
    task = given_task(config, loss=bce, metrics=metrics)
    measured = evaluate_run(config_path(config), trust=True, task=task, latency=UNTIMED)
    assert measured.pruned.metrics == last_of(read_events_of(config), RunFinished).metrics
    other = dataclasses.replace(task, data=OwnData(lambda split: data("train", 7, False)))
    measured = evaluate_run(config_path(config), trust=True, task=other, latency=UNTIMED)
    assert measured.pruned.metrics.images == 7 and list(measured.pruned.metrics.values) == ["right", "wrong"]


def test_evaluate_refuses_a_task_that_is_not_the_run_s(whole):
    folder = config_path(whole[0])
    for objects, message in (
        (
            {"loss": bce},
            r"other metrics \(metrics\.right: laasp_ray\.tasks\.metrics:Mean \w+ there, none here; ",
        ),
        ({}, r"another loss or other metrics \(loss: own_examples:bce there, none here; metrics\.right"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate_run(folder, trust=True, task=given_task(whole[0], **objects), latency=UNTIMED)
    task = dataclasses.replace(task_of(whole[0]), data=None)
    with pytest.raises(ConfigError, match=r"had a data set of its own, and the task given to evaluate_run has none"):
        evaluate_run(folder, trust=True, task=task, latency=UNTIMED)


def test_evaluate_refuses_flags_of_images_for_data_of_the_run_s_own(whole, tmp_path, capsys):
    folder = config_path(whole[0])
    for given, flag, value in (
        ({"data": "/pictures"}, "--data", "/pictures"),
        ({"data_format": "folder"}, "--format", "folder"),
    ):
        with pytest.raises(ConfigError, match=rf"^{flag} is '{value}', which has no effect .*: leave {flag} out"):
            evaluate_run(folder, trust=True, latency=UNTIMED, **given)
    assert cli.evaluate([str(folder), "--trust", "--engines", "none", "--data", str(tmp_path)]) == 2
    assert f"--data is '{tmp_path}', which has no effect" in capsys.readouterr().err


def test_metrics_that_were_objects_are_missed_not_left_out(tmp_path):
    """The folder names the loss, so that an evaluation could do without the metrics."""
    config = config_of(tmp_path, train__metrics={})
    run(config, metrics={"right": right})
    with pytest.raises(ConfigError, match=r"metrics\.right: \S+ \w+ there, none here\): Python objects are not in its"):
        evaluate_run(config_path(config), trust=True, latency=UNTIMED)
    task = task_of(config, metrics={"right": right})
    assert list(evaluate_run(config_path(config), trust=True, task=task, latency=UNTIMED).pruned.metrics.values) == [
        "right"
    ]


def test_the_trust_flag_says_all_that_it_runs(capsys):
    with pytest.raises(SystemExit):
        cli.evaluate(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "the network's builder, the data's format, factory and collate function, the loss, the metrics" in said


def test_a_job_with_a_recipe_by_import_path(tmp_path, capsys):
    arguments = ["own_examples:recipe_of_own", "--storage", str(tmp_path), "--no-ray"]
    assert cli.prune([*arguments, "--dry-run"]) == 0
    assert "24 to train on, 10 to test on" in capsys.readouterr().out
    assert cli.prune([*arguments, "--set", "train.metrics.right=own_examples:right"]) == 0
    shown = capsys.readouterr()
    assert "right" in shown.out and "top-1" not in shown.out + shown.err


def test_journals_of_before_are_read():
    """Metrics without values, epochs with top-1, a start without a task."""
    data = {"metrics": {"loss": 1.0, "top1": 0.5, "top5": 0.75, "images": 4}, "loader": "torchvision", "seconds": 1.0}
    assert event_from("baseline", data).metrics == Metrics(loss=1.0, top1=0.5, top5=0.75, images=4)
