"""Whole runs with averaged weights and distillation in this process: who teaches, and that nothing is lost when cut."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import write_pictures
from whole_runs import events_of, on_pictures, power_cut

from laasp_ray import prune
from laasp_ray.train import trainer
from laasp_ray.train.loop import EpochResult, run_training_phase

OPTIONS = {
    "train__schedule": "cosine",
    "train__label_smoothing": 0.1,
    "train__ema": 0.9,
    "train__distill": 0.5,
    "prune__fine_tune_every": 0.0,
    "prune__fine_tune_epochs": 2,
    "prune__flops_reduction": 0.05,
    "train__prune_epoch": 2,
    "train__epochs": 4,
}


@dataclass
class Heard:
    """A training phase: the tensors of its teacher, if it had one, and those of its last epoch."""

    phase: str
    teacher: dict[str, torch.Tensor] | None
    tensors: dict[str, Any] = field(default_factory=dict)


def listen(monkeypatch):
    """The training phases that are trained in this process from now on."""
    heard = []

    def listening(model, optimizer_state, training_phase, *, teacher=None, **more):
        known = None if teacher is None else {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        heard.append(Heard(training_phase.phase, known))
        for event in run_training_phase(model, optimizer_state, training_phase, teacher=teacher, **more):
            if isinstance(event, EpochResult):
                heard[-1].tensors = event.tensors
            yield event

    monkeypatch.setattr(trainer, "run_training_phase", listening)
    return heard


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), side=8, train=12, test=3)


def run(config):
    return prune(None, config, distributed=False)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, pictures):
    config = on_pictures(tmp_path_factory.mktemp("undisturbed"), pictures, **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        heard = listen(patch)
        return config, run(config), heard


def test_the_teacher_is_the_network_just_before_its_first_prune(undisturbed):
    config, result, heard = undisturbed
    assert sum(event.name == "iteration" for event in events_of(config)) >= 2
    first, *later = heard
    assert (first.phase, first.teacher) == ("train", None)
    assert [training_phase.phase for training_phase in later] == ["fine-tune"] * (len(later) - 1) + ["final"] and len(
        later
    ) >= 3
    assert all(same(training_phase.teacher, first.tensors) for training_phase in later)
    assert same(result.model.state_dict(), later[-1].tensors)


def test_a_run_cut_off_in_its_training_phases_ends_as_if_it_never_was(undisturbed, tmp_path, pictures, monkeypatch):
    reference, result, (first, *_) = undisturbed
    names = [event.name for event in events_of(reference)]
    # Of every training phase one epoch of two is written down; of the last one both are, but not its evaluation.
    positions = [number for number in range(1, len(names)) if names[number - 1 : number + 1] == ["epoch", "epoch"]]
    assert len(positions) >= 4 and names[-2:] == ["training_phase", "finish"]
    config = on_pictures(tmp_path, pictures, **OPTIONS)
    for position in (*positions, len(names) - 2):
        with power_cut(monkeypatch, position):
            run(config)
    heard = listen(monkeypatch)
    again = run(config)
    assert [event.name for event in events_of(config)] == names
    decisions = [
        [event.data["decision"] for event in events_of(each) if event.name == "iteration"]
        for each in (config, reference)
    ]
    assert decisions[0] == decisions[1]
    assert same(again.model.state_dict(), result.model.state_dict())
    assert again.summary["metrics"] == result.summary["metrics"]
    # What was left to do was the evaluation; who taught was known all the same.
    assert [training_phase.phase for training_phase in heard] == ["final"] and same(heard[0].teacher, first.tensors)


def test_nobody_teaches_a_run_that_does_not_distil(tmp_path, pictures, monkeypatch):
    heard = listen(monkeypatch)
    changes = {"prune__flops_reduction": 0.02, "train__prune_epoch": 0, "train__epochs": 1}
    run(on_pictures(tmp_path, pictures, **changes))
    assert [training_phase.phase for training_phase in heard][-1] == "final"
    assert all(training_phase.teacher is None for training_phase in heard)
