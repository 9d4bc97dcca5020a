"""What `laasp_ray` itself gives, and how little of it is imported before it is used."""

import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from torch import nn

import laasp_ray
from laasp_ray import errors, prune
from laasp_ray.errors import ConfigError
from laasp_ray.recipes import recipe

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())


def test_the_public_surface():
    raised = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
    assert set(laasp_ray.__all__) - raised == {"RunConfig", "__version__", "load_pruned", "prune", "rank", "recipe"}
    assert raised <= set(laasp_ray.__all__) and set(laasp_ray.__all__) <= set(dir(laasp_ray))
    for name in raised:
        assert getattr(laasp_ray, name) is getattr(errors, name)
    homes = {
        "RunConfig": "config",
        "load_pruned": "store.artifact",
        "prune": "api",
        "rank": "search",
        "recipe": "recipes",
    }
    for name, home in {**homes, "recipe": "recipes"}.items():
        assert getattr(laasp_ray, name) is getattr(importlib.import_module(f"laasp_ray.{home}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        laasp_ray.nothing  # noqa: B018


def test_the_version_is_pyprojects():
    assert laasp_ray.__version__ == PYPROJECT["project"]["version"]


def test_a_wheel_takes_every_file_of_the_package():
    package = Path(laasp_ray.__file__).parent
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    listed = PYPROJECT["tool"]["setuptools"]["package-data"]["laasp_ray"]
    assert {path.relative_to(package).as_posix() for path in files} == set(listed)


def test_the_order_of_prunes_arguments():
    assert list(inspect.signature(prune).parameters)[:2] == ["config", "model"]


@pytest.mark.parametrize("model", [None, nn.Identity()])
def test_the_order_of_before_is_told(model):
    with pytest.raises(ConfigError, match=r"its config second, .* write prune\(config, model\), or prune\(config\)"):
        prune(model, recipe("resnet20_cifar10"))


def test_a_config_of_another_type_is_told():
    with pytest.raises(ConfigError, match=r"prune's config is of type dict, must be a RunConfig: .*from_dict"):
        prune(recipe("resnet20_cifar10").to_dict())


CODE = """
import sys
import laasp_ray
laasp_ray.__version__, laasp_ray.ConfigError, laasp_ray.RunConfig
found = {"torch", "ray", "scipy", "torchvision", "pyarrow"} & set(sys.modules)
assert not found, found
laasp_ray.load_pruned
found = {"ray", "scipy", "torchvision", "pyarrow"} & set(sys.modules)
assert not found, found
"""


def test_each_name_brings_no_more_than_it_needs():
    assert subprocess.run([sys.executable, "-c", CODE], check=False).returncode == 0
