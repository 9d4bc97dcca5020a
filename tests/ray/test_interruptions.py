"""A run on Ray that is killed ends as one left in peace: one kill by default, three under the marker `exhaustive`.

`bench/interruptions.py` does it at twenty.
"""

import time

import interruptions
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


SHORT = {"prune.flops_reduction": 0.03, "prune.fine_tune_every": 0.03, "train.epochs": 2, "train.prune_epoch": 1}
"""One epoch, one iteration with two epochs of fine-tuning after it, and one last epoch."""


@pytest.mark.parametrize(("kills", "settings"), [(1, SHORT), pytest.param(3, {}, marks=pytest.mark.exhaustive)])
def test_kills_change_neither_decisions_nor_plan_nor_weights(tmp_path, kills, settings):
    log = tmp_path / "log"
    process = interruptions.start(tmp_path, "peace", ray=True, log=log, settings=settings)
    assert process.wait() == 0, log.read_text()[-4000:]
    kinds = [interruptions.kind_of(path) for path in interruptions.journal(tmp_path, "peace")]
    iteration, fine_tune = kinds.index("iteration"), kinds.index("epoch", kinds.index("iteration"))
    moments = [
        interruptions.Moment(kinds.index("epoch"), "epoch", 0.3, "driver"),  # in the middle of the first training phase
        interruptions.Moment(iteration, "iteration", 0.1, "driver"),
        interruptions.Moment(fine_tune, "epoch", 0.1, "trainer"),
    ]
    interruptions.disturb(tmp_path, moments[-kills:], ray=True, log=log, settings=settings)
    assert interruptions.outcome(tmp_path, "disturbed") == interruptions.outcome(tmp_path, "peace")
    assert [interruptions.kind_of(path) for path in interruptions.journal(tmp_path, "disturbed")] == kinds


def test_moments_meet_every_kind_of_event_and_are_a_function_of_the_seed():
    events = [
        "start",
        "epoch",
        "epoch",
        "training_phase",
        "calibration",
        "iteration",
        "iteration",
        "epoch",
        "training_phase",
        "finish",
    ]
    gaps = [1.0] * 9
    moments = interruptions.draw_moments(events, gaps, kills=20, seed=3, ray=True)
    assert len(moments) == 20
    assert {moment.kind for moment in moments} == {"start", "epoch", "training_phase", "calibration", "iteration"}
    assert [moment.event for moment in moments] == sorted(moment.event for moment in moments)
    assert moments == interruptions.draw_moments(events, gaps, kills=20, seed=3, ray=True)


def test_a_run_that_stands_still_is_noticed(tmp_path):
    process = interruptions.subprocess.Popen(["sleep", "60"])
    try:
        began = time.monotonic()
        with pytest.raises(SystemExit, match="made no progress"):
            interruptions.wait_for(lambda: False, process, seconds=0.2)
        assert time.monotonic() - began < 5
    finally:
        process.kill()
        process.wait()
