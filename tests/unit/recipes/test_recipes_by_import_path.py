"""Recipes of one's own, by import path."""

import argparse
import dataclasses

import pytest

from laasp_ray.cli import main as cli
from laasp_ray.errors import ConfigError
from laasp_ray.recipes import RECIPES, recipe

PATH = f"{__name__}:mine"


def mine():
    return dataclasses.replace(RECIPES["resnet20_cifar10"](), name="mine", seed=11)


def a_number():
    return 3


def fails():
    return {}["no such key"]


def out_of_range():
    return dataclasses.replace(mine().prune, step=2.0)


def test_its_config_is_given():
    assert recipe(PATH) == mine()


@pytest.mark.parametrize("command", [cli.prune, cli.sparsify])
def test_a_job_takes_it(command, monkeypatch, capsys):
    seen = []

    def keep(options: argparse.Namespace, base):
        seen.append(base(options))

    monkeypatch.setattr(cli, "_prune", keep)
    assert command([PATH]) == 0
    assert [(config.seed, config.model.builder) for config in seen] == [(11, "cifar.resnet20")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:f", r"the recipe 'no_such_module:f' cannot be imported \(ModuleNotFoundError"),
        (f"{__name__}:a_number", r":a_number' gave a int, must give a RunConfig"),
        (f"{__name__}:fails", r":fails' failed: KeyError: 'no such key'"),
        (f"{__name__}:out_of_range", r"prune\.step is 2\.0, must be a share"),
    ],
)
def test_what_is_no_recipe_is_told(path, message):
    with pytest.raises(ConfigError, match=message):
        recipe(path)


def test_it_has_the_variants_of_its_method():
    with pytest.raises(ConfigError, match=r"the recipe .*:mine has no variant 'pls'; its variants: paper, compensated"):
        recipe(PATH, "pls")
    assert recipe(PATH, "compensated").prune.compensate == "full"


def test_that_there_are_import_paths_is_said_of_an_unknown_name():
    with pytest.raises(ConfigError, match=r"unknown recipe 'mime'.*or an import path package\.module:function"):
        recipe("mime")
