"""Whole runs with the options of pruning, in this process: several targets, several prunes an iteration, rounding."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from fakes import Silent
from helpers import small_run, write_pictures
from whole_runs import events_of, on_pictures, power_cut, read_events_of

from laasp_ray import models, prune
from laasp_ray.cost.latency import Latency
from laasp_ray.errors import ExhaustedError
from laasp_ray.methods import targets
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.report.progress import LineProgress
from laasp_ray.report.summary import format_summary, summarise
from laasp_ray.run.events import IterationDone, RunFinished
from laasp_ray.run.state import fold
from laasp_ray.store.checkpoint import load_checkpoint
from laasp_ray.store.storage import Storage

QUICK = {
    "train__prune_epoch": 0,
    "train__epochs": 1,
    "train__batch_size": 12,
    "search__racing": "off",
    "prune__step": 0.05,
    "prune__fine_tune_epochs": 0,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), side=8, train=24, test=3)


def config_of(storage, pictures, **changes):
    settings = QUICK | {"search__images": 40} | changes
    if changes.get("prune__method", "laasp") != "laasp":
        del settings["prune__step"]
    return on_pictures(storage, pictures, **settings)


def run(config, progress=None):
    return prune(config, distributed=False, progress=progress or Silent())


def iterations(config):
    return [event.data for event in events_of(config) if event.name == "iteration"]


def state_of(config):
    return fold(read_events_of(config), config)


def without_names(state):
    """But for the names of files, which tell the attempt that wrote them; what is in them must be the same."""
    return dataclasses.replace(state, checkpoint="", digests={}), sorted(state.digests.values())


def clock_of(*medians):
    """A measure_pair that says 1 ms for the unpruned network, and for the pruned one these, the last ever after."""
    left = list(medians)

    def pair(first, second, shape, *, batch_size, device, repeats=20):
        if first is second:  # before the run it is tried whether such a batch fits
            return None
        median = left.pop(0) if len(left) > 1 else left[0]
        return tuple(Latency(each, (each, each), batch_size, device, 1, repeats) for each in (1.0, median))

    return pair


ALL = {
    "search__reestimate_batchnorm": True,
    "prune__prunes_per_iteration": 2,
    "prune__round_to": 4,
    "prune__flops_reduction": 0.15,
    "prune__parameters_reduction": 0.12,
    "prune__step": 0.03,
    "prune__fine_tune_epochs": 1,
    "prune__fine_tune_every": 0.0,
}


@pytest.fixture(scope="module")
def with_all(tmp_path_factory, pictures):
    config = config_of(tmp_path_factory.mktemp("all"), pictures, **ALL)
    return config, run(config)


def test_a_run_with_all_of_them_reaches_every_target(with_all):
    config, result = with_all
    steps = iterations(config)
    flops = [iteration["decision"]["flops_reduction"] for iteration in steps]
    parameters = [iteration["reached"]["parameters"] for iteration in steps]
    assert flops[-1] >= 0.15 and parameters[-1] >= 0.12
    assert all(flops[iteration] < 0.15 or parameters[iteration] < 0.12 for iteration in range(len(steps) - 1))
    # Exact: of the unpruned network's parameters, those of the network that came out.
    unpruned = sum(parameter.numel() for parameter in models.build(config.model).parameters())
    left = sum(parameter.numel() for parameter in result.model.parameters())
    assert parameters[-1] == 1 - left / unpruned == result.summary["parameters_reduction"]
    assert result.summary["flops_reduction"] == pytest.approx(flops[-1])
    # Two at a time, of groups apart, each leaving a multiple of 4.
    assert all(len(iteration["decision"]["further"]) == 1 for iteration in steps[:-1])
    assert all(kept % 4 == 0 for iteration in steps for kept in iteration["kept_filters"].values())
    summary = format_summary(summarise(read_events_of(config)))
    assert f"FLOPs reduction {flops[-1]:.2%} of 15.00%, parameters reduction {parameters[-1]:.2%} of 12.00%" in summary


def test_it_comes_to_the_same_when_it_was_cut_off(with_all, tmp_path, pictures, monkeypatch):
    reference, result = with_all
    names = [event.name for event in events_of(reference)]
    assert (
        "training_phase" in names[: len(names) - 1 - names[::-1].index("iteration")]
    )  # a fine-tuning comes between iterations
    config = config_of(tmp_path, pictures, **ALL)
    for position in [place for place, name in enumerate(names) if name in ("iteration", "finish")]:
        with power_cut(monkeypatch, position):
            run(config)
    again = run(config)
    assert [event.name for event in events_of(config)] == names
    assert [iteration["decision"] for iteration in iterations(config)] == [
        iteration["decision"] for iteration in iterations(reference)
    ]
    assert without_names(state_of(config)) == without_names(state_of(reference))
    assert state_of(config).reached["parameters"] == iterations(reference)[-1]["reached"]["parameters"]
    ours, theirs = again.model.state_dict(), result.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


def test_statistics_measured_for_scoring_do_not_stay_in_the_network(tmp_path, pictures):
    # Nothing is trained after pruning, so that what comes out is what was pruned.
    changes = {"train__prune_epoch": 1, "prune__flops_reduction": 0.04}
    config = config_of(tmp_path, pictures, search__reestimate_batchnorm=True, **changes)
    result = run(config)
    folder = Path(config.storage) / config.name
    unpruned = models.build(config.model)
    unpruned.load_state_dict(load_checkpoint(Storage.open(str(folder)), "unpruned").model)
    apply_plan(unpruned, Plan.from_json(json.loads((folder / "pruned" / "plan.json").read_text())))
    assert all(torch.equal(tensor, result.model.state_dict()[name]) for name, tensor in unpruned.state_dict().items())
    # But it was scored with others.
    plain = config_of(tmp_path, pictures, name="plain", **changes)
    run(plain)
    assert iterations(plain)[0]["decision"]["loss_before"] != iterations(config)[0]["decision"]["loss_before"]


def test_without_options_a_iteration_holds_what_it_always_held(tmp_path, pictures):
    config = config_of(tmp_path, pictures, prune__flops_reduction=0.02)
    result = run(config)
    (iteration,) = iterations(config)
    assert iteration["reached"] == {} and iteration["latency"] is None and iteration["ends_pruning"] is None
    assert iteration["decision"]["further"] == [] and len(iteration["kept_filters"]) > 0
    assert result.summary["parameters_reduction"] is result.summary["latency_reduction"] is None


LATENCY = {"prune__flops_reduction": 0.0, "prune__latency_reduction": 0.06}


def test_a_target_for_latency_ends_pruning_when_the_clock_says_so(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(targets, "measure_pair", clock_of(1.02, 0.97, 0.93))
    config, progress = config_of(tmp_path, pictures, **LATENCY), Silent()
    result = run(config, progress)
    reached = [iteration["reached"]["latency"] for iteration in iterations(config)]
    assert reached == pytest.approx([-0.02, 0.03, 0.07])
    assert [each["median_ms"] for each in iterations(config)[-1]["latency"]] == [1.0, 0.93]
    after = [state.reached["latency"] for event, state in progress.seen if isinstance(event, IterationDone)]
    assert after == reached
    assert state_of(config).reached["latency"] == reached[-1] == result.summary["latency_reduction"]
    (finished,) = progress.of(RunFinished)
    assert finished.text.startswith("pruned by ") and finished.text.endswith("% of FLOPs, 7.00% of latency")


def test_what_the_clock_said_stays_when_the_run_goes_on(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(targets, "measure_pair", clock_of(1.0))
    config = config_of(tmp_path, pictures, **LATENCY)
    with power_cut(monkeypatch, 4):  # start, baseline, calibration set, iteration
        run(config)
    (before,) = iterations(config)
    # The machine is another now, and its clock counts from the next iteration on.
    monkeypatch.setattr(targets, "measure_pair", clock_of(0.5))
    run(config)
    assert iterations(config)[0] == before and before["reached"] == {"latency": 0.0}
    assert [iteration["reached"] for iteration in iterations(config)[1:]] == [{"latency": 0.5}]


def all_but(layer, tmp_path):
    modules = models.build(small_run(tmp_path).model).named_modules()
    return [name for name, module in modules if isinstance(module, torch.nn.Conv2d) and name != layer]


def test_where_no_filter_is_left_a_target_for_latency_ends_pruning_with_a_word(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(targets, "measure_pair", clock_of(1.1))
    ignored = all_but("layer3.0.conv1", tmp_path)
    changes = {"prune__ignored": ignored, "prune__max_pruned": 0.25, "prune__step": 0.1}
    config, lines = config_of(tmp_path, pictures, **LATENCY, **changes), io.StringIO()
    result = run(config, LineProgress(config.prune.targets, lines, lambda: 0.0))
    names = [event.name for event in events_of(config)]
    assert names[names.index("exhausted") - 1] == "iteration" and names[-3:] == ["epoch", "training_phase", "finish"]
    assert result.model.get_submodule("layer3.0.conv1").out_channels == 48
    assert result.summary["latency_reduction"] == pytest.approx(-0.1)
    (note,) = [line for line in lines.getvalue().splitlines() if "short" in line]
    assert note.startswith(
        "note: pruning ends short of its targets (latency +10.00% of 6.00%): no layer has a filter left"
    )
    # Cut off before the final training, it knows.
    again = config_of(tmp_path / "again", pictures, **LATENCY, **changes)
    with power_cut(monkeypatch, names.index("exhausted") + 1):
        run(again)
    assert state_of(again).phase == "final"
    run(again)
    assert [event.name for event in events_of(again)] == names


def test_without_such_a_target_it_is_an_error(tmp_path, pictures):
    # Bounded by turns, a target may be out of reach; here the filters end before the iterations do.
    ignored = all_but("layer3.0.conv1", tmp_path)
    changes = {"prune__ignored": ignored, "prune__max_pruned": 0.25, "prune__step": 0.1, "prune__iterations": 99}
    with pytest.raises(ExhaustedError, match=r"no layer has a filter left to give within prune\.max_pruned=0\.25"):
        run(config_of(tmp_path, pictures, **changes))


def test_pls_has_these_targets_and_rounds_too(tmp_path, pictures):
    changes = {
        "prune__method": "pls",
        "prune__flops_reduction": 0.0,
        "prune__parameters_reduction": 0.06,
        "prune__round_to": 8,
        "prune__percent": 5.0,
        "search__reestimate_batchnorm": True,
    }
    config = config_of(tmp_path, pictures, **changes)
    result = run(config)
    unpruned = sum(parameter.numel() for parameter in models.build(config.model).parameters())
    left = sum(parameter.numel() for parameter in result.model.parameters())
    assert iterations(config)[-1]["reached"] == {"parameters": 1 - left / unpruned}
    assert 1 - left / unpruned >= 0.06
    assert all(kept % 8 == 0 for kept in iterations(config)[-1]["kept_filters"].values())
