"""What a dry run counts, by hand, and what it says."""

import dataclasses

import pytest
import torch
from helpers import small_run
from torch import nn

from laasp_ray.dry_run import Machine, Workload, describe, dry_run, seconds_of, workload_of
from laasp_ray.errors import ConfigError, DataError
from laasp_ray.preflight import prepare
from laasp_ray.train import speed
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


def workload(tmp_path, **changes):
    settings = {
        "prune__flops_reduction": 0.7,
        "prune__step": 0.01,
        "prune__criteria": ["l1", "l2"],
        "prune__recover_every": 0.3,
        "prune__recover_epochs": 3,
        "train__epochs": 9,
        "train__prune_epoch": 2,
        **changes,
    }
    torch.manual_seed(0)
    model = TwoConvolutions()
    with torch.no_grad():
        for layer in (model.a, model.b):  # the weakest filter by either norm
            layer.weight[2] *= 1e-3
    return workload_of(prepare(small_run(tmp_path, **settings), model))


def test_what_a_run_consists_of_by_hand(tmp_path):
    found = workload(tmp_path)
    # One filter of each layer, the same one by both criteria.
    assert (found.proposals, found.candidates) == (4, 2)
    removes = ((A / 4 + B / 4) + (B / 4 + FC / 4)) / 2 / TOTAL
    assert found.removes == pytest.approx(removes) == pytest.approx(0.1964, abs=1e-4)
    # 0.7 / 0.1964 = 3.56: 4 turns; 0.3 / 0.1964 = 1.5: a recovery every 2 of them.
    assert (found.turns, found.recoveries) == (4, 2)
    assert found.epochs == {"train": 2, "recover": 6, "final": 7}
    assert found.evaluations == 4
    assert found.loss_images == 40
    # A prune of `a` is heard from `b` on, one of `b` from `fc` on; and the network as it stands.
    assert found.passes == pytest.approx(1 + ((B + FC) + FC) / TOTAL, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "recoveries", "epochs"),
    [
        ({"prune__recover_every": 0.0}, 4, {"train": 2, "recover": 12, "final": 7}),
        ({"prune__recover_epochs": 0}, 0, {"train": 2, "recover": 0, "final": 7}),
        ({"train__prune_epoch": 0}, 2, {"train": 0, "recover": 6, "final": 9}),
        ({"train__prune_epoch": 9}, 2, {"train": 9, "recover": 6, "final": 0}),
    ],
)
def test_epochs_by_phase(tmp_path, changes, recoveries, epochs):
    found = workload(tmp_path, **changes)
    assert (found.recoveries, found.epochs) == (recoveries, epochs)


def test_turns_by_the_target_that_is_furthest(tmp_path):
    # Of 4 * 27 + 4, 4 * 36 + 4 and 4 * 10 + 10 parameters a prune of `a` takes 28 and 36, one of `b` 37 and 10.
    each = ((28 + 36) + (37 + 10)) / 2 / (112 + 148 + 50)
    assert each == pytest.approx(0.1790, abs=1e-4)
    parameters = {"prune__parameters_reduction": 0.7}
    assert workload(tmp_path, prune__flops_reduction=0.0, **parameters).turns == 4  # 3.91
    assert workload(tmp_path, prune__flops_reduction=0.1, **parameters).turns == 4
    assert workload(tmp_path, prune__flops_reduction=0.0, prune__parameters_reduction=0.72).turns == 5  # 4.02
    assert workload(tmp_path, prune__flops_reduction=0.0, prune__latency_reduction=0.7).turns == 4  # as FLOPs: 3.56


def test_several_prunes_a_turn_and_statistics_measured_anew(tmp_path):
    plain = workload(tmp_path)
    several = workload(tmp_path, prune__prunes_per_turn=2)
    # 0.7 / (2 * 0.1964) = 1.8 turns; a recovery after each, which takes more than 0.3.
    assert (several.turns, several.recoveries) == (2, 2)
    assert several.passes == pytest.approx(plain.passes + 2)  # all together, and the network as it stands beside them


def test_no_more_images_than_there_are(tmp_path):
    assert workload(tmp_path, search__images=100_000).loss_images == 1442


def test_seconds_by_hand():
    work = Workload(
        proposals=40,
        candidates=30,
        removes=0.01,
        passes=16.0,
        loss_images=1000,
        turns=50,
        recoveries=10,
        epochs={"train": 5, "recover": 20, "final": 7},
        evaluations=12,
        preparing_s=2.0,
    )
    # An epoch: 4,000 images at 4 x 100 a second. A turn: 16 x 1,000 at 8 x 500, and 2 s. Evaluation: 800 at 4 x 200.
    assert seconds_of(work, MACHINE, train_images=4000, test_images=800) == pytest.approx(
        {"train": 50, "turns": 50 * (4 + 2), "recover": 200, "final": 70, "evaluate": 12}
    )


def test_what_it_says(tmp_path):
    prepared = prepare(small_run(tmp_path))
    work = dataclasses.replace(workload_of(prepared), preparing_s=0.0)
    text = describe(prepared, work, MACHINE, repeats=3)
    assert "cifar.resnet20, 10,203,776 multiply-accumulates" in text  # a quarter of 40,813,184, less the head
    assert "from scratch, 2 epochs; pruning at epoch 2 of 3" in text
    assert f"about {work.turns}: 12.00% of FLOPs, {work.removes:.2%} a candidate" in text
    assert f"42 proposals a turn, {work.candidates} distinct (21 layers, 2 criteria)" in text
    assert f"40 images for each candidate: {40 * work.candidates:,} a turn" in text
    assert "100.0 images/s in training" in text and "one of 8 evaluation tasks" in text
    assert "3 runs" in text and "racing drops" in text
    assert "teacher" not in text
    taught = prepare(small_run(tmp_path, train__distill=0.5))
    assert "every epoch asks the teacher" in describe(taught, work, MACHINE)
    exhaustive = prepare(small_run(tmp_path, search__racing="off"))
    prune = {"prune__parameters_reduction": 0.2, "prune__latency_reduction": 0.1, "prune__prunes_per_turn": 2}
    other = describe(prepare(small_run(tmp_path, **prune, search__reestimate_batchnorm=True)), work, MACHINE)
    shares = "12.00% of FLOPs and 20.00% of parameters and 10.00% of latency"
    assert f"about {work.turns}: {shares}, {work.removes:.2%} of FLOPs a candidate, 2 together" in other
    assert "latency falls as FLOPs do" in other and "every turn makes 2 prunes" in other
    assert "latency" not in text and "every turn makes" not in text
    assert "racing" not in describe(exhaustive, work, MACHINE)


def test_a_dry_run_measures_and_leaves_nothing_behind(tmp_path):
    text = dry_run(small_run(tmp_path / "runs"), distributed=False)
    assert "Dry run of small" in text and "time, all" in text and "dali-cpu" in text
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_refuses_what_a_run_refuses(tmp_path):
    with pytest.raises(DataError, match="no data set at"):
        dry_run(small_run(tmp_path, data__path=str(tmp_path / "none"), data__format="auto"), distributed=False)
    with pytest.raises(ConfigError, match="can be reached"):
        dry_run(small_run(tmp_path, prune__flops_reduction=0.99), distributed=False)


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
