"""Whole runs that test between their epochs: what journal, plots and reader are told, and which epoch was best."""

import io

import pytest
import torch
from helpers import write_pictures
from run_events import epoch_done, metrics, phase_done, run_started
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from whole_runs import events_of, on_pictures, power_cut, read_events_of

from laasp_ray import prune
from laasp_ray.config import RunConfig
from laasp_ray.report.progress import LineProgress
from laasp_ray.report.summary import format_summary, summarise
from laasp_ray.run.events import BestEpoch
from laasp_ray.run.totals import best_epoch, seconds_spent
from laasp_ray.store.storage import Storage


def epoch(phase, number, top1=None):
    return epoch_done(phase=phase, epoch=number, metrics=None if top1 is None else metrics(top1))


def training_phase(phase, top1):
    return phase_done(phase, metrics=metrics(top1))


BEFORE = [
    run_started(),
    epoch("train", 0, 0.875),
    epoch("train", 1),
    training_phase("train", 1.0),
    epoch("fine-tune", 2),
    training_phase("fine-tune", 1.0),
]


@pytest.mark.parametrize(
    ("events", "best"),
    [
        # The first of equals, and whatever was before the final training does not count.
        ([epoch("final", 2, 0.5), epoch("final", 3, 0.75), epoch("final", 4, 0.75), epoch("final", 5)], (3, 0.75)),
        ([epoch("final", 2, 0.5), epoch("final", 3, 0.625), epoch("final", 4)], (4, 0.75)),  # the evaluation at the end
        ([epoch("final", 2), epoch("final", 3), epoch("final", 4)], (4, 0.75)),  # the only one
        ([epoch("final", 2), epoch("final", 3, 0.875), epoch("final", 4)], (3, 0.875)),
        ([], None),  # a schedule that ends where pruning begins
    ],
)
def test_the_best_epoch_by_hand(events, best):
    found = best_epoch([*BEFORE, *events, training_phase("final", 0.75)])
    assert found == (None if best is None else BestEpoch(epoch=best[0], metrics=metrics(best[1])))


def test_a_runs_seconds_are_also_those_of_its_tests():
    events = [
        epoch_done(seconds=8.0, test_seconds=2.0),
        epoch_done(seconds=16.0, test_seconds=0.0),
        phase_done(seconds=99.0, evaluation_seconds=4.0),
    ]
    assert seconds_spent(events) == 30.0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), side=8, train=12, test=9)


def config_of(storage, pictures, **changes) -> RunConfig:
    """Epochs 0 to 2, two iterations with a fine-tuning each, epochs 3 to 6."""
    settings = {
        "train__prune_epoch": 3,
        "train__epochs": 7,
        "train__learning_rate": 0.02,
        "train__ema": 0.5,
        "prune__fine_tune_every": 0.0,
        "prune__fine_tune_epochs": 2,
        "prune__flops_reduction": 0.05,
    }
    return on_pictures(storage, pictures, **(settings | changes))


def run(config, progress=None):
    return prune(config, distributed=False, progress=progress)


def metrics_of(config):
    """(phase, epoch of the schedule, metrics) of every epoch."""
    return [
        (event.data["phase"], event.data["epoch"], event.data["metrics"])
        for event in events_of(config)
        if event.name == "epoch"
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, pictures):
    config, lines = config_of(tmp_path_factory.mktemp("undisturbed"), pictures), io.StringIO()
    return config, run(config, LineProgress(config.prune.targets, lines, lambda: 0.0)), lines.getvalue().splitlines()


def test_the_epochs_before_and_after_pruning_are_tested_but_for_the_last_of_each(undisturbed):
    config, _, _ = undisturbed
    tested = {phase: [] for phase in ("train", "fine-tune", "final")}
    for phase, number, found in metrics_of(config):
        tested[phase] += [(number, found is not None)]
    assert tested["train"] == [(0, True), (1, True), (2, False)]
    assert tested["final"] == [(3, True), (4, True), (5, True), (6, False)]
    assert len(tested["fine-tune"]) >= 4 and set(tested["fine-tune"]) == {(3, False)}
    seconds = [event.data["test_seconds"] > 0 for event in events_of(config) if event.name == "epoch"]
    assert seconds == [found is not None for _, _, found in metrics_of(config)]
    assert all(found["images"] == 9 for _, _, found in metrics_of(config) if found)


def test_the_best_epoch_is_in_the_summary(undisturbed):
    config, result, _ = undisturbed
    final = [(number, found or result.summary["metrics"]) for phase, number, found in metrics_of(config)][-4:]
    highest = max(found["top1"] for _, found in final)
    number, found = next(entry for entry in final if entry[1]["top1"] == highest)
    assert result.summary["best"] == {"epoch": number, "metrics": found}
    assert (
        f"Best tested epoch of the final training: {number + 1} of 7, top-1 {highest:.2%}, top-5 100.00%, loss "
        f"{found['loss']:.4f} (the table has the last)"
    ) in format_summary(summarise(read_events_of(config))).splitlines()


def test_who_watches_sees_the_test_accuracy_of_an_epoch(undisturbed):
    config, _, lines = undisturbed
    shown = [line for line in lines if line.startswith(("train: epoch", "final: epoch"))]
    tested = [found for phase, _, found in metrics_of(config) if phase != "fine-tune"]
    assert len(shown) == len(tested) == 7
    for line, found in zip(shown, tested, strict=True):
        assert (f", test top1 {found['top1']:.2%}, learning rate" in line) if found else "test" not in line
    assert not any("test top1" in line for line in lines if line.startswith("fine-tune"))


def test_the_plots_have_every_test_once(undisturbed):
    config, _, _ = undisturbed
    expected, trained = [], 0
    for event in events_of(config):
        trained += event.name == "epoch"
        found = event.data.get("metrics") if event.name in ("epoch", "training_phase") else None
        if found is not None:
            expected.append((trained, found))
    folder = Storage.open(config.storage).child(config.name).local_path / "tensorboard"
    for key in ("loss", "top1", "top5"):
        points = []
        for file in folder.iterdir():
            accumulator = EventAccumulator(str(file)).Reload()
            points += [(point.step, point.value) for point in accumulator.Scalars(f"test/{key}")]
        assert sorted(points) == [(step, pytest.approx(found[key])) for step, found in expected]


def test_a_run_cut_off_in_its_final_epochs_ends_as_if_it_never_was(undisturbed, tmp_path, pictures, monkeypatch):
    reference, result, _ = undisturbed
    config = config_of(tmp_path, pictures)
    count = len(events_of(reference))
    assert [event.name for event in events_of(reference)][-6:] == ["epoch"] * 4 + ["training_phase", "finish"]
    # The power fails when an event is about to be written, all work for it done.
    for position in range(count - 5, count):
        with power_cut(monkeypatch, position):
            run(config)
    again = run(config)
    assert metrics_of(config) == metrics_of(reference)
    assert (again.summary["best"], again.summary["metrics"]) == (result.summary["best"], result.summary["metrics"])
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_without_tests_the_run_is_the_same_and_the_last_epoch_the_best_that_is_known(
    undisturbed, tmp_path, pictures, monkeypatch
):
    reference, result, _ = undisturbed
    config = config_of(tmp_path, pictures, train__test_every=0)
    with power_cut(monkeypatch, 2):  # the second epoch
        run(config_of(tmp_path, pictures, train__test_every=2))  # it may change when a run goes on
    other = run(config)
    assert all(found is None for _, _, found in metrics_of(config))
    assert other.summary["best"] == {"epoch": 6, "metrics": other.summary["metrics"]}
    assert other.summary["metrics"] == result.summary["metrics"]
    decisions = [
        [event.data["decision"] for event in events_of(each) if event.name == "iteration"]
        for each in (config, reference)
    ]
    assert decisions[0] == decisions[1]
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


def test_a_schedule_that_ends_with_pruning_has_no_best_epoch(tmp_path, pictures):
    changes = {"train__prune_epoch": 1, "train__epochs": 1, "prune__flops_reduction": 0.02}
    config = config_of(tmp_path, pictures, **changes)
    result = run(config)
    assert result.summary["best"] is None
    assert "est tested epoch" not in format_summary(summarise(read_events_of(config)))
