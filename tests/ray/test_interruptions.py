"""A run on Ray that is killed ends as an undisturbed one: one kill by default, three under the marker `exhaustive`.

The undisturbed run has one process, which trains both parts of each batch. `bench/interruptions.py` kills twenty times.
"""

import time

import interruptions
import pytest
from run_folder import RunFolder

from laasp_ray.run.beginning import start_run
from laasp_ray.run.preflight import open_run, prepare
from laasp_ray.store.journal import Journal

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


SHORT = {"prune.flops_reduction": 0.03, "prune.fine_tune_every": 0.03, "train.epochs": 2, "train.prune_epoch": 1}
"""One epoch, one iteration with two epochs of fine-tuning after it, and one last epoch."""


def begin(folder, name, settings, parts):
    """Writes the first event of a run, with as many parts of a batch as a cluster with so many trainers gives it."""
    config = interruptions.config_of(folder, name, settings)
    storage = open_run(config)
    start_run(prepare(config), storage, Journal(storage), None, parts)


@pytest.mark.parametrize(("kills", "settings"), [(1, SHORT), pytest.param(3, {}, marks=pytest.mark.exhaustive)])
def test_kills_change_neither_decisions_nor_plan_nor_weights(tmp_path, monkeypatch, kills, settings):
    log = tmp_path / "log"
    begin(tmp_path, "peace", settings, parts=2)
    with monkeypatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as in a trainer: the last bits depend on it
        process = interruptions.start(tmp_path, "peace", ray=False, log=log, settings=settings)
        assert process.wait() == 0, log.read_text()[-4000:]
    peace, disturbed = (RunFolder(str(tmp_path / name)) for name in ("peace", "disturbed"))
    kinds = peace.kinds()
    iteration, fine_tune = kinds.index("iteration"), kinds.index("epoch", kinds.index("iteration"))
    moments = [
        interruptions.Moment(kinds.index("epoch"), "epoch", 0.3, "driver"),  # in the middle of the first training phase
        interruptions.Moment(iteration, "iteration", 0.1, "driver"),
        interruptions.Moment(fine_tune, "epoch", 0.1, "trainer"),
    ]
    interruptions.disturb(tmp_path, moments[-kills:], ray=True, log=log, settings=settings)
    assert disturbed.outcome() == peace.outcome()
    assert disturbed.kinds() == kinds


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
