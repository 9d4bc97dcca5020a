"""Whole sweeps in this process, on tiny pictures."""

import dataclasses
import json
import weakref

import pytest
import torch
from fakes import Silent
from helpers import write_pictures
from whole_runs import events_of, on_pictures, read_events_of

from laasp_ray import load_pruned, models, prune
from laasp_ray.errors import ConfigError, TrainingError
from laasp_ray.models.copying import deep_copy
from laasp_ray.run.events import EpochDone, IterationDone, RunStarted
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage
from laasp_ray.sweep import in_process
from laasp_ray.sweep.goals import MaxDrop, SpaceSearch, Targets, WithinLatency
from laasp_ray.sweep.run import run_sweep
from laasp_ray.sweep.trials import Trial

TARGETS = Targets((0.06, 0.09, 0.12))
SHARED = {"prune__exact_target": False}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images"), side=8, train=12, test=6)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(in_process, "_progress", lambda trial: Silent())


def run(config, goal, **options):
    return run_sweep(config, goal, distributed=False, say=lambda line: None, **options)


def sweep_of(tmp_path, pictures, **changes):
    return dataclasses.replace(on_pictures(tmp_path, pictures, **SHARED | changes), name="sweep")


def weights(folder, config):
    return load_pruned(folder, models.build(config.model)).state_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    """A sweep over TARGETS, its config and its result."""
    config = sweep_of(tmp_path_factory.mktemp("finished"), pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_process, "_progress", lambda trial: Silent())
        return config, run(config, TARGETS)


def test_each_trial_is_the_run_that_was_made_for_it_alone(tmp_path, pictures, finished):
    config, result = finished
    assert [row.name for row in result.rows] == ["flops-0.06", "flops-0.09", "flops-0.12"]
    for row, target in zip(result.rows[:2], TARGETS.flops_reductions[:2], strict=True):
        alone = on_pictures(tmp_path, pictures, prune__flops_reduction=target, name=f"alone{target}", **SHARED)
        prune(alone, distributed=False, progress=Silent())
        theirs, ours = weights(folder(alone), alone), weights(row.folder, config)
        assert row.is_finished and row.flops_reduction >= target
        assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert result.rows[0].shared_seconds > 0 and result.rows[2].shared_seconds == 0
    stored = json.loads(folder(config).read("sweep.json"))
    assert stored["best"] == result.best and len(stored["trials"]) == 3
    assert folder(config).read("pareto.png")[:4] == b"\x89PNG"


def test_it_prunes_once(finished):
    config, result = finished
    runs = [inside(config, row.name) for row in result.rows]
    starts = [next(event for event in read_events_of(one) if isinstance(event, RunStarted)) for one in runs]
    assert starts[2].forked is None
    deepest = [event.time for event in events_of(runs[2]) if event.name == IterationDone.NAME]
    for one, start in zip(runs[:2], starts[:2], strict=True):
        times = [event.time for event in events_of(one) if event.name == IterationDone.NAME]
        assert times == deepest[: len(times)]
        assert start.forked["from"].endswith("flops-0.12") and start.forked["iteration"] == len(times)


def test_the_targets_of_a_sweep_are_not_exact(finished):
    config, _ = finished
    exact = dataclasses.replace(config, prune=dataclasses.replace(config.prune, exact_target=True))
    assert run(exact, TARGETS).rows  # the same sweep: it is left as it is


def test_other_settings_under_the_same_name_are_refused(finished, pictures):
    config, _ = finished
    with pytest.raises(
        ConfigError, match=r"settings \(goal.flops_reductions: \[0.06, 0.09, 0.12\] there, \[0.07\] here"
    ):
        run(config, Targets((0.07,)))
    with pytest.raises(ConfigError, match=r"started with other settings \(seed: 0 there, 5 here\)"):
        run(dataclasses.replace(config, seed=5), TARGETS)
    with pytest.raises(ConfigError, match=r"flops-0\.12 holds a run, not a sweep: give the sweep another --name"):
        run(inside(config, "flops-0.12"), TARGETS)


def test_a_sweep_goes_on_with_what_its_numbers_depend_on(finished, tmp_path):
    config, _ = finished
    (first, *_) = Journal(folder(config)).events()
    threads = torch.get_num_threads()
    assert first.data["arithmetic"] == {"ray": False, "workers": 1, "threads": threads, "driver_threads": threads}
    with pytest.raises(ConfigError, match=r"'sweep' was started with --no-ray: given there, not given here"):
        run_sweep(config, TARGETS, say=lambda line: None)


def test_a_sweep_that_was_cut_off_goes_on(tmp_path, pictures, monkeypatch):
    config = sweep_of(tmp_path, pictures)

    class Cut:
        def __init__(self, trial: Trial, epochs: int) -> None:
            self.left = epochs if trial.name == "flops-0.09" else 100

        def on_event(self, event, state):
            self.left -= isinstance(event, EpochDone)
            if self.left == 0:
                raise KeyboardInterrupt

        def close(self):
            pass

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(in_process, "_progress", lambda trial: Cut(trial, 1))
        run(config, TARGETS)
    before = {name: events_of(inside(config, name))[-1].time for name in ("flops-0.06", "flops-0.12")}
    result = run(config, TARGETS)
    assert {name: events_of(inside(config, name))[-1].time for name in before} == before
    assert all(row.is_finished for row in result.rows)
    names = [event.data["name"] for event in Journal(folder(config)).events() if event.name == "trial"]
    assert sorted(names) == ["flops-0.06", "flops-0.09", "flops-0.12"]


def inside(config, name):
    return dataclasses.replace(config, name=name, storage=f"{config.storage}/{config.name}")


def folder(config):
    return Storage.open(config.storage).child(config.name)


def test_the_largest_reduction_within_a_drop_is_found_by_a_bracket(tmp_path, pictures):
    """All trials beat an untrained network, so that the deepest is the answer; a drop below that has no answer."""
    config = sweep_of(tmp_path, pictures)
    result = run(config, MaxDrop(50.0))
    iterations = sum(event.name == "iteration" for event in events_of(inside(config, "trajectory")))
    assert iterations >= 3
    assert result.best == f"iteration-{iterations:03d}"
    assert "it is the trajectory's last" in result.said and "standard error" in result.said
    assert len(result.rows) < iterations
    again = run(config, MaxDrop(50.0))
    assert again.best == result.best and len(again.rows) == len(result.rows)


@pytest.fixture
def measured_by_size(monkeypatch):
    """Latencies by the number of parameters, ms of a thousand; those that are measured again by `factor` as much."""
    from laasp_ray.cost.latency import Latency
    from laasp_ray.methods import targets
    from laasp_ray.sweep import latency, results

    factor = [1.0]

    def of(network, by):
        size = sum(parameter.numel() for parameter in network.parameters())
        return Latency(by * size / 1000, (0.0, 0.0), 1, "cpu", 1, 2)

    monkeypatch.setattr(targets, "measure_latency", lambda one, other, config, **_: (of(one, 1), of(other, 1)))
    for module in (latency, results):
        monkeypatch.setattr(
            module, "measure_latency", lambda one, other, config, **_: (of(one, 1), of(other, factor[0]))
        )
    return factor


def size_of(config):
    return sum(parameter.numel() for parameter in models.build(config.model).parameters()) / 1000


def test_the_first_network_within_a_latency_is_trained(tmp_path, pictures, measured_by_size):
    config = sweep_of(tmp_path, pictures)
    asked = round(0.97 * size_of(config), 3)
    result = run(config, WithinLatency(asked))
    (row,) = result.rows
    assert row.is_finished and row.latency_ms[1] <= asked and result.best == row.name
    steps = [event for event in read_events_of(inside(config, row.name)) if isinstance(event, IterationDone)]
    assert [event.reached["latency"] >= 0.03 for event in steps] == [False] * (len(steps) - 1) + [True]
    with pytest.raises(ConfigError, match=r"--latency-ms 1e\+09: the unpruned network takes .* already"):
        run(dataclasses.replace(config, name="other"), WithinLatency(1e9))


def test_a_network_that_misses_the_latency_when_it_is_measured_again_is_not_named(
    tmp_path, pictures, measured_by_size, caplog
):
    """Pruning ends 3% below what is asked, so that a little more is still within, and much more is not."""
    config = sweep_of(tmp_path, pictures)
    asked = round(0.97 * size_of(config), 3)
    measured_by_size[0] = 1.02
    assert run(config, WithinLatency(asked)).best is not None
    measured_by_size[0] = 1.5
    result = run(dataclasses.replace(config, name="missed"), WithinLatency(asked))
    (row,) = result.rows
    assert (
        row.is_finished
        and result.best is None
        and json.loads(folder(dataclasses.replace(config, name="missed")).read("sweep.json"))["best"] is None
    )
    assert result.said.startswith(f"no network is within {asked:g} ms: {row.name} takes")
    assert "when it is measured again" in caplog.text


def test_the_networks_of_a_trajectory_are_not_all_in_memory(tmp_path, pictures, measured_by_size, monkeypatch):
    from laasp_ray.sweep import latency

    config = sweep_of(tmp_path, pictures)
    run(config, MaxDrop(50.0))
    alive = weakref.WeakSet()
    most = []

    def copied(network):
        made = deep_copy(network)
        alive.add(made)
        most.append(len(alive))
        return made

    monkeypatch.setattr(latency, "deep_copy", copied)
    assert latency.first_within(inside(config, "trajectory"), 1e9)[0] == 1
    assert len(most) >= 3 and max(most) <= 2


def test_a_space_is_searched_for_each_target_on_its_own(tmp_path, pictures):
    config = sweep_of(tmp_path, pictures)
    space = {"prune.criteria": {"choice": [["l1"], ["cosine"]]}, "train.learning_rate": {"loguniform": [0.01, 0.1]}}
    goal = SpaceSearch((0.06, 0.08), space, 1)
    result = run(config, goal)
    assert sorted(row.name for row in result.rows) == ["flops-0.06-t01", "flops-0.08-t01"]
    for row in result.rows:
        assert row.is_finished and 0.01 <= row.settings["train.learning_rate"] <= 0.1
        theirs = json.loads((tmp_path / "sweep" / row.name / "config.json").read_text())
        assert theirs["train"]["learning_rate"] == row.settings["train.learning_rate"]
        assert theirs["prune"]["criteria"] == list(row.settings["prune.criteria"])
    again = run(config, goal)
    assert {row.name: dict(row.settings) for row in again.rows} == {row.name: dict(row.settings) for row in result.rows}


def test_a_target_that_is_beyond_reach_is_refused_before_anything_is_trained(tmp_path, pictures):
    with pytest.raises(ConfigError, match=r"prune\.flops_reduction is 0\.999, but .* at most 0\.9\d* can be reached"):
        run(sweep_of(tmp_path, pictures), Targets((0.3, 0.999)))
    assert not list((tmp_path / "sweep").rglob("*start.json"))


@pytest.mark.exhaustive
def test_what_fails_is_told_with_the_others_kept_and_tried_again(tmp_path, pictures, monkeypatch):
    config = sweep_of(tmp_path, pictures)

    class Fails:
        def __init__(self, trial: Trial) -> None:
            self.fails = trial.name == "flops-0.12"

        def on_event(self, event, state):
            if self.fails and state.phase == "final":
                raise TrainingError("the loss is nan")

        def close(self):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(in_process, "_progress", Fails)
        failure = run(config, TARGETS).failure
    assert failure.startswith("1 of 3 trials without a result: flops-0.12, TrainingError: the loss is nan; the others")
    stored = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["status"] for row in stored["trials"]] == ["finished", "finished", "TrainingError: the loss is nan"]
    again = run(config, TARGETS)
    assert all(row.is_finished for row in again.rows) and again.failure == ""


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (MaxDrop(0.0), r"--max-drop 0 must be above 0"),
        (MaxDrop(1.0), r"--max-drop 1 is less than one of the 6 test images \(16\.7 points\).* at least 16\.667"),
        (MaxDrop(17.0, base_top1=4.0), r"--base-top1 4 must be above --max-drop 17"),
        (WithinLatency(0.0), r"--latency-ms 0 must be above 0"),
    ],
)
def test_a_goal_that_cannot_be_is_refused_before_anything_is_trained(tmp_path, pictures, goal, message):
    with pytest.raises(ConfigError, match=message):
        run(sweep_of(tmp_path, pictures), goal)
    assert not (tmp_path / "sweep" / "trajectory").exists()
