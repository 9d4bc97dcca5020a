"""The comparison of methods: that all have one budget, what is run, and that a copied run is the run it goes on as."""

import io
import json
from pathlib import Path

import methods
import pytest
import torch
from baselines import UniformPruning
from helpers import write_digits
from methods import Chain, Method, Place
from whole_runs import events_of, on_digits

from laasp_ray import prune
from laasp_ray.config.compat import differing_keys
from laasp_ray.errors import ConfigError
from laasp_ray.records import RunState
from laasp_ray.run.state import next_training_phase
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage


def place(tmp_path, *further):
    return Place(Path("data"), tmp_path, further)


def test_all_that_are_compared_have_one_budget(tmp_path):
    configs = {name: methods.config_of(name, 1, 0.3, place(tmp_path)) for name in methods.COMPARED}
    for name, config in configs.items():
        rates = {
            phase: [epoch.learning_rate for epoch in next_training_phase(RunState(phase=phase), config).epochs]
            for phase in ("fine-tune", "final")
        }
        assert rates == {"fine-tune": [pytest.approx(0.0008)], "final": [pytest.approx(0.0008)] * 5}, name
        prune_config = config.prune
        assert (prune_config.flops_reduction, prune_config.step, prune_config.fine_tune_every) == (0.3, 0.02, 0.05)
        assert (config.search.images, config.seed, config.name) == (1000, 1, f"{name}-0.3-seed1")
        assert prune_config.criteria == (
            (name,) if name in ("l1", "l2", "euclidean", "cosine") else ("l1", "l2", "euclidean", "cosine")
        )
        assert config.train.test_every == 0
        assert prune_config.method == "laasp"  # what chooses is given beside it
    assert len({json.dumps(config.to_dict()["train"]) for config in configs.values()}) == 1
    assert configs["laasp"].train.learning_rate == 0.1


CHANGED = {
    "distillation": {"train.distill"},
    "label_smoothing": {"train.label_smoothing"},
    "ema": {"train.ema"},
    "cosine_schedule": {"train.schedule", "train.learning_rate"},
    "batchnorm": {"search.reestimate_batchnorm"},
    "round_to_8": {"prune.round_to"},
    "parameters": {"prune.flops_reduction", "prune.parameters_reduction"},
    "latency": {"prune.flops_reduction", "prune.latency_reduction"},
    "without_cosine": {"prune.criteria"},
    "three_prunes": {"prune.prunes_per_iteration", "search.racing"},
}


@pytest.mark.parametrize("base", ["laasp", "laasp_obs-made_up"])
@pytest.mark.parametrize("change", CHANGED)
def test_a_row_of_an_option_differs_from_the_one_without_in_that_alone(tmp_path, base, change):
    plain, option = (methods.config_of(name, 1, 0.3, place(tmp_path)) for name in (base, f"{base}-{change}"))
    assert set(differing_keys(plain.to_dict(), option.to_dict())) == {"name", *CHANGED[change]}
    assert option.train.learning_rate_at(option.train.prune_epoch) == pytest.approx(0.0008)


def test_every_option_has_such_a_row():
    assert {f"{base}-{change}" for base in ("laasp", methods.DEFAULT) for change in CHANGED} == set(methods.OPTIONS)


def test_an_option_that_changes_the_schedule_begins_at_the_same_rate(tmp_path, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "laasp-lower", Method(("train.drop_factor=0.1",)))
    train = methods.config_of("laasp-lower", 0, 0.3, place(tmp_path)).train
    assert (train.drop_factor, train.learning_rate) == (0.1, pytest.approx(0.8))  # 0.8 x 0.1^3 = 0.1 x 0.2^3
    assert train.learning_rate_at(130) == pytest.approx(0.0008)


def test_settings_of_the_command_line_reach_all_runs_and_unknown_ones_are_named(tmp_path, monkeypatch):
    small = methods.config_of("uniform", 0, 0.5, place(tmp_path, "search.images=100", "train.epochs=131"))
    assert (small.search.images, small.train.epochs, small.prune.flops_reduction) == (100, 131, 0.5)
    monkeypatch.setitem(methods.METHODS, "laasp-typo", Method(("train.distil_much=1",)))
    with pytest.raises(ConfigError, match=r"train\.distil_much"):
        methods.config_of("laasp-typo", 0, 0.3, place(tmp_path))


def test_what_is_in_the_file_is_not_run_again():
    there = {("laasp", 0.3, 0), ("uniform", 0.3, 0), ("uniform", 0.5, 0), ("laasp", 0.5, 1)}
    assert methods.missing(["laasp", "uniform"], [0, 1], [0.3, 0.5], there) == [
        Chain("laasp", 0, (0.5,)),
        Chain("laasp", 1, (0.3,)),
        Chain("uniform", 1, (0.3, 0.5)),
    ]


def small(storage, digits, target, name):
    changes = {"train__prune_epoch": 0, "train__epochs": 1, "prune__flops_reduction": target, "name": name}
    return on_digits(storage, digits, **changes)


def decided(config):
    return [event.data["decision"] for event in events_of(config) if event.name == "iteration"]


def test_a_copy_made_before_the_final_epochs_goes_on_as_the_run_that_prunes_further(tmp_path):
    digits = write_digits(tmp_path / "digits", side=16, train=60, test=12)
    first, further = (small(tmp_path / "forked", digits, target, f"to-{target}") for target in (0.02, 0.05))
    log = io.StringIO()
    prune(first, distributed=False, progress=methods.Forking(first, further, log), method=UniformPruning())
    assert "final: 1 epochs" in log.getvalue()
    copied = events_of(further)
    assert [event.data for event in copied[1:]] == [event.data for event in events_of(first)[1 : len(copied)]]
    assert copied[0].data["config"] == further.to_dict() and copied[-1].name in ("iteration", "training_phase")
    forked = prune(further, distributed=False, progress=methods.Forking(further, None, log), method=UniformPruning())
    alone = small(tmp_path / "alone", digits, 0.05, "to-0.05")
    whole = prune(alone, distributed=False, progress=methods.Forking(alone, None, log), method=UniformPruning())
    assert len(decided(first)) < len(decided(further)) and decided(further) == decided(alone)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, forked.model.state_dict()[name]), name


def test_a_run_that_is_in_its_final_epochs_is_not_copied(tmp_path):
    digits = write_digits(tmp_path / "digits", side=16, train=60, test=12)
    first, further = (small(tmp_path, digits, target, f"to-{target}") for target in (0.02, 0.05))
    journal = Journal(Storage.open(first.storage).child(first.name))
    journal.append("start", {"config": first.to_dict()})
    journal.append("epoch", {"phase": "final"})
    methods.fork(first, further)
    assert not (tmp_path / further.name).exists()
