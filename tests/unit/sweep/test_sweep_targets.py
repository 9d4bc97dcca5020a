"""The runs of a sweep over targets."""

import dataclasses

import pytest

from laasp_ray.config import GroupSparsityConfig
from laasp_ray.errors import ConfigError
from laasp_ray.recipes import recipe
from laasp_ray.sweep.targets import runs_for


def test_each_target_is_a_run_in_the_sweeps_folder_and_the_deepest_leads():
    config = dataclasses.replace(recipe("resnet20_cifar10"), name="sweep", storage="runs/")
    runs = runs_for(config, [0.54, 0.3, 0.425])
    assert (runs.deepest.name, runs.deepest.prune.flops_reduction) == ("flops-0.54", 0.54)
    assert [(run.name, run.prune.flops_reduction) for run in runs.others] == [
        ("flops-0.3", 0.3),
        ("flops-0.425", 0.425),
    ]
    for run in (runs.deepest, *runs.others):
        assert run.storage == "runs/sweep"
        same = dataclasses.replace(
            run,
            name="sweep",
            storage="runs/",
            prune=dataclasses.replace(run.prune, flops_reduction=config.prune.flops_reduction),
        )
        assert same == config
    assert runs_for(config, [0.5]).others == ()
    remote = dataclasses.replace(config, storage="s3://bucket/runs?region=eu-west-1")
    assert runs_for(remote, [0.5]).deepest.storage == "s3://bucket/runs/sweep?region=eu-west-1"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "needs one target at least"),
        ([0.3, 1.0], r"--flops-reduction 1 is no share"),
        ([0.0, 0.3], r"--flops-reduction 0 is no share"),
        ([30, 0.5], r"--flops-reduction 30 is no share .* above 0 and below 1"),
        ([float("nan")], r"--flops-reduction nan is no share"),
        ([0.3, 0.5, 0.3], r"--flops-reduction 0\.3 is given twice"),
    ],
)
def test_targets_that_are_none_are_told(targets, message):
    with pytest.raises(ConfigError, match=message):
        runs_for(recipe("resnet20_cifar10"), targets)


def test_a_method_without_targets_is_told():
    config = dataclasses.replace(recipe("resnet20_cifar10"), prune=GroupSparsityConfig())
    with pytest.raises(ConfigError, match="needs a method that removes filters, not group_sparsity"):
        runs_for(config, [0.3])
