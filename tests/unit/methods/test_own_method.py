"""A method of a user: its own section, checks and cost."""

import json

import pytest
from fakes import Silent
from helpers import small_run
from own_methods import First, FirstConfig
from torch import nn
from whole_runs import events_of

from laasp_ray import prune
from laasp_ray.config import RunConfig
from laasp_ray.errors import ConfigError
from laasp_ray.methods import method_of
from laasp_ray.planning.dry_run import Machine, describe
from laasp_ray.planning.workload import workload_of
from laasp_ray.run.preflight import prepare
from laasp_ray.train.speed import TrainingSpeed

MINE = {"prune__method": "own_methods:First", "train__prune_epoch": 0, "train__epochs": 1, "search__images": 20}
MACHINE = Machine(
    workers=1, tasks=1, trainer=TrainingSpeed(training=100.0, evaluation=200.0, device="x", loader="y"), forward=40.0
)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


def test_its_section_is_its_own(tmp_path):
    config = small_run(tmp_path, **MINE, prune__filters=3)
    assert type(config.prune) is FirstConfig and config.prune.filters == 3
    assert config.prune.fine_tune_every == 0.05  # what both have is kept
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert type(method_of(config)) is First
    with pytest.raises(ConfigError, match=r"prune\.filters is 0, must be at least 1"):
        small_run(tmp_path, **MINE, prune__filters=0)
    with pytest.raises(ConfigError, match=r"prune\.step is 0\.1, but it is of method laasp, and this run's is own_m"):
        small_run(tmp_path, **MINE, prune__step=0.1)


def test_a_class_that_is_no_method_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"prune\.method 'own_methods:NoMethod' must be a subclass of .*PruningMethod"
    ):
        small_run(tmp_path, prune__method="own_methods:NoMethod")


def test_it_prunes_what_it_says(tmp_path):
    config = small_run(tmp_path, **MINE, prune__filters=3, prune__flops_reduction=0.3)
    result = prune(config, network(), distributed=False, progress=Silent())
    assert result.model[0].out_channels == 5 and result.model[2].out_channels == 8
    # 14 * 14 * 8 * 27 = 42,336, 12 * 12 * 8 * 72 = 82,944 and 80 of all; of the first two 3 of 8 parts go.
    (iteration,) = [event.data for event in events_of(config) if event.name == "iteration"]
    gone = (42_336 + 82_944) * 3 / 8 / (42_336 + 82_944 + 80)
    assert iteration["decision"]["flops_reduction"] == pytest.approx(gone)


def test_its_own_check_comes_before_anything(tmp_path):
    with pytest.raises(ConfigError, match="First prunes layer 0, and there is none"):
        prepare(small_run(tmp_path, **MINE))


def test_a_dry_run_says_what_it_costs(tmp_path):
    prepared = prepare(small_run(tmp_path, **MINE, prune__fine_tune_epochs=2), network())
    work = workload_of(prepared)
    assert work.epochs == {"train": 0, "fine-tune": 2, "final": 1}
    lines = [" ".join(line.split()) for line in describe(prepared, work, MACHINE).splitlines()]
    # 3 iterations of 2 passes over 20 images, 40 a second.
    assert {"layer 0, three times", "time, iterations 3 s"} <= set(lines)
