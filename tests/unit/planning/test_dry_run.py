"""What a dry run says, checks and measures."""

import dataclasses
import json

import pytest
import torch
from helpers import small_run
from run_events import epoch_done, run_started
from torch import nn

from laasp_ray.errors import ConfigError, DataError, StoreError
from laasp_ray.methods.estimate import Estimate
from laasp_ray.planning.dry_run import Machine, describe, dry_run, seconds_of
from laasp_ray.planning.workload import Workload, workload_of
from laasp_ray.report.repeats import runs_of
from laasp_ray.run.events import data_of
from laasp_ray.run.preflight import prepare
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage
from laasp_ray.train import speed
from laasp_ray.train.speed import TrainingSpeed

MACHINE = Machine(
    workers=4, tasks=8, trainer=TrainingSpeed(training=100.0, evaluation=200.0, device="x", loader="y"), forward=500.0
)


def test_seconds_by_hand():
    work = Workload(
        epochs={"train": 5, "fine-tune": 20, "final": 7},
        evaluations=12,
        calibration_images=1000,
        pruning=Estimate(iterations=50, fine_tunes=10, passes=16.0, preparing_s=2.0),
    )
    # An epoch: 4,000 images at 4 x 100 a second. An iteration: 16 x 1,000 at 8 x 500, and 2 s. Evaluation: 800 at 4 x
    # 200.
    assert seconds_of(work, MACHINE, train_images=4000, test_images=800) == pytest.approx(
        {"train": 50, "iterations": 50 * (4 + 2), "fine-tune": 200, "final": 70, "evaluate": 12}
    )
    stages = Workload(epochs=work.epochs, evaluations=3, pruning=Estimate(iterations=2, fine_tunes=1))
    assert seconds_of(stages, MACHINE, train_images=4000, test_images=800) == pytest.approx(
        {"train": 50, "fine-tune": 200, "final": 70, "evaluate": 3}
    )


def said(config, **options):
    """What a dry run says of it, and its workload."""
    prepared = prepare(config)
    work = workload_of(prepared)
    return describe(prepared, work, MACHINE, **options), work


def test_what_it_says(tmp_path):
    text, work = said(small_run(tmp_path), runs=3)
    pruning = work.pruning
    assert "cifar.resnet20, 10,203,776 multiply-accumulates" in text  # a quarter of 40,813,184, less the head
    assert "from scratch, 2 epochs; pruning at epoch 2 of 3" in text
    assert f"about {pruning.iterations}: 12.00% of FLOPs, {pruning.removes:.2%} a candidate" in text
    assert f"42 proposals an iteration, {pruning.candidates} distinct (21 layers, 2 criteria)" in text
    assert f"40 images for each candidate: {40 * pruning.candidates:,} an iteration" in text
    # Before pruning, after fine-tunings, at the end, and after the first of the two epochs that come before pruning.
    assert f"evaluations       about {3 + pruning.fine_tunes} on the test images" in text
    assert "100.0 images/s in training" in text and "one of 8 evaluation tasks" in text
    assert "3 runs" in text and "racing drops" in text
    assert "teacher" not in text and "latency" not in text and "every iteration makes" not in text
    assert "at most" not in text.partition("fine-tunings")[0] and "drawn" not in text
    assert "at the end        export: none; not timed" in text
    distilling, _ = said(small_run(tmp_path, train__distill=0.5, search__racing="off"))
    assert "every epoch asks the teacher" in distilling and "racing" not in distilling


def test_what_it_says_of_the_finished_network(tmp_path, monkeypatch):
    text, _ = said(small_run(tmp_path, export__format="auto", export__latency=["eager", "compile"]))
    assert "at the end        export: onnx; timed in eager, compile at batch 1, 64" in text
    monkeypatch.setattr("laasp_ray.planning.dry_run.missing", lambda: ("onnx",))
    text, _ = said(small_run(tmp_path, export__format="auto"))
    assert "at the end        no export, since onnx is missing; not timed" in text


def test_what_it_says_of_other_targets_and_of_a_pool_that_looks_at_data(tmp_path):
    prune = {"prune__parameters_reduction": 0.2, "prune__latency_reduction": 0.1, "prune__prunes_per_iteration": 2}
    other, work = said(small_run(tmp_path, **prune, search__reestimate_batchnorm=True))
    shares = "12.00% of FLOPs and 20.00% of parameters and 10.00% of latency"
    removes = f"{work.pruning.removes:.2%}"
    assert f"about {work.pruning.iterations}: {shares}, {removes} of FLOPs a candidate, 2 together" in other
    assert "latency falls as FLOPs do" in other and "every iteration makes 2 prunes" in other
    pool, work = said(small_run(tmp_path, prune__criteria=["l1", "pls", "own_criteria:INSTANCE"], prune__iterations=2))
    assert f"{work.pruning.removes:.2%} a candidate; at most 2\n" in pool
    assert "- pls, own_criteria:INSTANCE: its picks" in pool


def test_what_it_says_of_pls(tmp_path):
    text, work = said(small_run(tmp_path, prune__method="pls", prune__iterations=5))
    assert f"about 2: 12.00% of FLOPs, {work.pruning.removes:.2%} an iteration; at most 5\n" in text
    assert (
        "336 in 9 layers that no others are coupled to; 34 go in the first iteration, 10% of those left in each" in text
    )
    assert "40 images: scored, then the loss" in text and "worth 3 forward passes" in text
    assert "every layer loses the same share of its filters" in text and "time, iterations" in text
    assert "candidate" not in text and "racing" not in text


def test_an_iteration_of_pls_that_reaches_the_target_takes_what_it_needs(tmp_path):
    settings = {"prune__method": "pls", "prune__flops_reduction": 0.05}
    text, work = said(small_run(tmp_path, **settings))
    assert "; at most 34 go in the first iteration" in text
    assert (work.pruning.iterations, work.pruning.removes) == (1, 0.05)
    _, work = said(small_run(tmp_path, **settings, prune__exact_target=False))
    assert work.pruning.removes > 0.05


def test_what_it_says_of_stages(tmp_path):
    prepared = prepare(small_run(tmp_path, prune__method="group_sparsity", prune__stages=[4, 6]))
    work = workload_of(prepared)
    text = describe(prepared, work, MACHINE)
    first, last = work.pruning.stages
    # All but the first of 19 convolutions and two shortcuts; half and three quarters of all weights go.
    assert first.weights == last.weights == 2 * first.kept == 4 * last.kept
    for label, stage, pruned in (("stage 1", first, 4), ("stage 2", last, 6)):
        stay = f"{stage.kept:,} of {stage.weights:,} weights stay; then 1 epochs"
        assert f"{label}          {pruned} of 8 in 20 layers: {stay}" in text
    assert "left dense       conv1: 3 inputs a filter, fewer than the group of 8" in text
    assert "linear, and prune.fc_pruned_per_group is not given" in text
    assert "time, fine-tune" in text and "time, iterations" not in text and "evaluation tasks" not in text
    begun = dataclasses.replace(prepared.config.prune, from_run="there")
    config = dataclasses.replace(prepared.config, prune=begun)
    work = dataclasses.replace(work, epochs={**work.epochs, "train": 0})
    text = describe(dataclasses.replace(prepared, config=config), work, MACHINE)
    assert "the pruned network of there; pruning" in text


def test_a_dry_run_measures_and_leaves_nothing_behind(tmp_path):
    text = dry_run(small_run(tmp_path / "runs"), distributed=False)
    assert "Dry run of small" in text and "time, all" in text and "dali-cpu" in text
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_refuses_what_a_run_refuses(tmp_path):
    with pytest.raises(DataError, match="no data set at"):
        dry_run(small_run(tmp_path, data__path=str(tmp_path / "none"), data__format="auto"), distributed=False)
    with pytest.raises(ConfigError, match="can be reached"):
        dry_run(small_run(tmp_path, prune__flops_reduction=0.99), distributed=False)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr("laasp_ray.planning.dry_run._here", lambda prepared: MACHINE)


def files_in(folder):
    return sorted(folder.rglob("*"))


def started(run):
    storage = Storage.open(run.storage).child(run.name)
    storage.write("config.json", json.dumps(run.to_dict()).encode())
    journal = Journal(storage)
    journal.append("start", data_of(run_started(config=run.to_dict())))
    return journal


def test_a_name_that_belongs_to_another_run_is_refused(fast, tmp_path):
    started(small_run(tmp_path, train__epochs=4))
    with pytest.raises(ConfigError, match=r"started with another config \(train\.epochs: 4 there, 3 here\)"):
        dry_run(small_run(tmp_path), distributed=False)


def test_of_repeats_the_names_of_all_are_looked_at(fast, tmp_path):
    config = small_run(tmp_path)
    started(small_run(tmp_path, train__epochs=4))  # whose name is none of theirs
    assert "2 runs" in dry_run(config, distributed=False, repeats=2)
    started(runs_of(small_run(tmp_path, train__epochs=4), 2)[1])
    with pytest.raises(ConfigError, match=r"the run .small-seed1. in .* was started with another config"):
        dry_run(config, distributed=False, repeats=2)


def test_a_store_that_cannot_be_written_is_refused(fast, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="name another folder"):
        dry_run(small_run(tmp_path / "file" / "runs"), distributed=False)


def test_what_is_in_the_store_is_said_and_left_alone(fast, tmp_path):
    config = small_run(tmp_path)
    assert "in the store" not in dry_run(config, distributed=False)
    journal = started(config)
    journal.append("epoch", data_of(epoch_done()))
    before = files_in(tmp_path)
    text = dry_run(config, distributed=False)
    assert "in the store      small has begun (iterations done: 0, epochs: 1), and would go on" in text
    assert files_in(tmp_path) == before
    journal.append("finish", {})
    assert "small is finished, and would be left as it is" in dry_run(config, distributed=False)


def test_the_first_batch_warms_up_and_the_budget_ends_it(monkeypatch):
    now = 0.0

    def work(images, labels):
        nonlocal now
        now += float(labels)

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)

    def rate(*seconds, images=4):
        return speed._rate(((torch.zeros(images, 1), s) for s in seconds), work, torch.device("cpu"))

    assert rate(100.0) == pytest.approx(4 / 100)  # there is no other
    assert rate(7.0, 1.0, 3.0) == pytest.approx(8 / 4)
    assert rate(7.0, 2.0, 1000.0) == pytest.approx(4 / 2)  # 9 s are over the budget


def test_measuring_leaves_the_network_alone(tmp_path):
    prepared = prepare(small_run(tmp_path))
    before = {name: tensor.clone() for name, tensor in prepared.unpruned.state_dict().items()}
    config = dataclasses.replace(prepared.config, train=dataclasses.replace(prepared.config.train, batch_size=8))
    measured = speed.measure_training(prepared.unpruned, config, torch.device("cpu"), world=2)
    assert measured.training > 0 and measured.evaluation > 0 and "CPU threads" in measured.device
    assert speed.measure_forward(prepared.unpruned, config, torch.device("cpu")) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.unpruned.state_dict().items())
    assert prepared.unpruned.training


NOTED = []


class Noting(nn.Module):
    """Notes in which mode it is asked."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, 10)

    def forward(self, x):
        NOTED.append((self.training, torch.is_grad_enabled()))
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_the_teacher_is_part_of_what_is_measured(tmp_path, distill):
    NOTED.clear()
    speed.measure_training(Noting(), small_run(tmp_path, train__distill=distill), torch.device("cpu"))
    steps = NOTED.count((True, True))
    expected = [(True, True), (False, False)] * steps if distill else [(True, True)] * steps
    assert steps > 1 and NOTED[: len(expected)] == expected
    assert len(NOTED) > len(expected)  # the evaluation
