"""The status of a run, from events and two looks at its owner."""

import dataclasses
import json

import pytest
from run_events import decision, epoch_done, iteration_done, metrics, phase_done, run_started

from laasp_ray.report.status import status_of, status_text, statuses_table
from laasp_ray.run.events import Exhausted, FaultSurvived, RunFinished
from laasp_ray.store.ownership import OwnerSeen, Token
from laasp_ray.store.processes import Process

CONFIG = {
    "train": {"epochs": 10, "prune_epoch": 4, "pretrained": None},
    "prune": {"flops_reduction": 0.4, "fine_tune_epochs": 2},
}
TOKEN = Token("id", 3, Process("gpu7", 4711, "m", "1"), "2026-11-26 10:00:00 UTC", 10.0)
SEEN = OwnerSeen(TOKEN, 5, "2026-11-26 11:00:00 UTC", left=False)
LATER = dataclasses.replace(SEEN, beats=6)
TRAINED = [epoch_done(position=number, epochs=4, seconds=9.0, test_seconds=1.0) for number in (1, 2, 3, 4)]


def status(*events, before=SEEN, now=LATER, attempts=3):
    return status_of("resnet", "s3://bucket/resnet", [run_started(config=CONFIG), *events], attempts, before, now)


def pruned(iteration, share):
    return iteration_done(decision(iteration=iteration, flops_reduction=share, loss=0.25), seconds={"total": 30.0})


@pytest.mark.parametrize(
    ("before", "now", "driver"),
    [
        (SEEN, LATER, "works"),
        (SEEN, SEEN, "silent"),
        (SEEN, dataclasses.replace(SEEN, left=True), "stopped"),
        (None, None, "stopped"),
        (None, SEEN, "works"),  # it has begun while this looked
    ],
)
def test_whether_a_driver_works_is_seen_by_its_heartbeats(before, now, driver):
    assert status(before=before, now=now).driver == driver


def test_a_finished_run_is_finished_whatever_its_owner():
    finish = RunFinished(
        macs=600,
        macs_unpruned=1000,
        macs_convention="by hand",
        flops_reduction=0.4,
        parameters=6,
        parameters_unpruned=10,
        metrics=metrics(top1=0.75),
        seconds=90.0,
    )
    found = status(finish, before=SEEN, now=SEEN)
    assert (found.driver, found.phase, found.eta_s, found.test.top1) == ("finished", "done", 0.0, 0.75)


def test_a_run_that_nobody_has_begun():
    found = status_of("resnet", "runs/resnet", [], 0, None, None)
    assert (found.driver, found.phase, found.eta_s) == ("none", "preparing", None)


def test_while_training_before_pruning_the_time_left_is_not_known():
    found = status(*TRAINED[:2])
    assert (found.phase, found.epoch, found.epochs, found.epoch_s) == ("train", 2, 4, 10.0)
    assert found.eta_s is None and found.targets == {"FLOPs": 0.4} and found.reached == {"FLOPs": 0.0}


def test_the_time_left_follows_from_the_paces_so_far():
    fine_tune = [
        epoch_done(phase="fine-tune", position=number, epochs=2, seconds=9.0, test_seconds=1.0) for number in (1, 2)
    ]
    found = status(*TRAINED, phase_done(), pruned(1, 0.05), pruned(2, 0.1), *fine_tune, phase_done("fine-tune"))
    # 0.1 of 0.4 is gone in two iterations: six are left, each with one epoch of fine-tuning as so far, and six epochs
    # in the end: 6 * 30 + 6 * 10 + 6 * 10.
    assert (found.phase, found.iteration, found.iteration_s, found.eta_s) == ("prune", 2, 30.0, 300.0)
    assert found.reached == {"FLOPs": 0.1}
    assert found.last_decision == "conv by l1, loss 0.2500"


def test_in_the_final_training_its_epochs_are_left():
    final = epoch_done(phase="final", position=1, epochs=6, seconds=9.0, test_seconds=1.0, metrics=metrics(top1=0.9))
    found = status(*TRAINED, phase_done(), pruned(1, 0.41), final)
    assert (found.phase, found.epoch, found.epochs, found.eta_s) == ("final", 1, 6, 50.0)
    assert found.test.top1 == 0.9


def test_after_exhaustion_no_iterations_are_expected_that_were_not_seen():
    assert status(*TRAINED, phase_done(), pruned(1, 0.1), Exhausted(reason="none is left")).phase == "final"


def test_what_people_read():
    text = status_text(status(*TRAINED, phase_done(), pruned(1, 0.1)))
    assert text.splitlines() == [
        "run              resnet in s3://bucket/resnet",
        "driver           a driver works",
        "                 attempt 3: host gpu7, process 4711, since 2026-11-26 10:00:00 UTC",
        "                 last heartbeat 2026-11-26 11:00:00 UTC by its clock",
        "phase            prune",
        "FLOPs reduction  10.00% of 40.00%, 1 iterations",
        "last prune       conv by l1, loss 0.2500",
        "training         loss 1.0000, top-1 50.00%",
        "test             loss 0.5000, top-1 50.00%",
        "pace             10 s an epoch, 30 s an iteration",
        "time left        about 2 min 30 s",
    ]


def test_faults_that_were_survived_are_counted_and_the_last_is_told():
    lost = [FaultSurvived(text=f"a search worker is lost (process {number} on gpu3)") for number in (1, 2)]
    found = status(*TRAINED[:1], *lost)
    assert len(found.faults) == 2 and found.phase == "train"
    assert "faults survived  2, the last: a search worker is lost (process 2 on gpu3)" in status_text(found)


def test_the_list_of_runs_and_json():
    one = status(*TRAINED, phase_done(), pruned(1, 0.1))
    lines = statuses_table([one]).splitlines()
    assert " ".join(lines[0].split()) == "run driver phase iterations reduction test top-1 time left"
    assert lines[2].split() == [
        "resnet",
        "works",
        "prune",
        "1",
        "10.0%",
        "of",
        "40.0%",
        "FLOPs",
        "50.00%",
        "2",
        "min",
        "30",
        "s",
    ]
    read = json.loads(json.dumps(one.to_dict()))
    assert (read["phase"], read["driver_text"], read["reached"]) == ("prune", "a driver works", {"FLOPs": 0.1})
