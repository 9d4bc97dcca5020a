"""The examples of docs/extending.md, run as they stand there."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from fakes import Silent
from helpers import write_pictures
from torch import nn

from laasp_ray import models, prune
from laasp_ray.config import DataConfig, ModelConfig
from laasp_ray.data.sources.registry import open_source
from laasp_ray.errors import ConfigError
from laasp_ray.planning.dry_run import dry_run
from laasp_ray.recipes import recipe
from laasp_ray.search import rank
from laasp_ray.store.artifact import load_pruned

PAGE = Path(__file__).parents[3] / "docs" / "extending.md"
FILES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL))
LONGEST = 10
"""Lines of code of an example; imports, blank lines and docstrings aside."""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The examples as a package that Python finds; it is forgotten afterwards."""
    for name, code in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


@pytest.fixture
def lists(tmp_path):
    """Pictures of 32 x 32 with the lists of the example: two classes, 12 images to train on and 6 to test on."""
    root = write_pictures(tmp_path / "pictures", side=32, train=18, test=9)
    for split, folder in (("train", "train"), ("test", "val")):
        lines = [
            f"{path.relative_to(root)},{name}"
            for letter, name in (("a", "cat"), ("b", "dog"))
            for path in sorted((root / folder / letter).iterdir())
        ]
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def test_every_example_is_found_and_short():
    assert set(FILES) == {f"mypackage/{name}.py" for name in ("criteria", "data", "methods", "networks", "recipes")}
    for name, code in FILES.items():
        lines = [line for line in code.splitlines() if line.strip()]
        counted = [line for line in lines if not re.match(r'(from|import) |\s+"""', line)]
        assert 2 <= len(counted) <= LONGEST, name
        assert max(map(len, lines)) <= 120, name


def test_the_criterion_ranks(package):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        for filter, spread in enumerate((3.0, 0.1, 2.0, 1.0)):
            network[0].weight[filter] = torch.linspace(-spread, spread, 27).view(3, 3, 3)
    ranking = rank(
        network,
        torch.randn(6, 3, 8, 8),
        torch.arange(6) % 2,
        criteria=("mypackage.criteria:spread",),
        step=0.5,
        max_pruned=0.75,
        ignored=(),
    )
    assert [(entry.layer, entry.criterion, entry.filters) for entry in ranking] == [
        ("0", "mypackage.criteria:spread", (1, 3))
    ]


def test_the_data_source_is_opened(package, lists):
    config = DataConfig(path=str(lists), format="mypackage.data:CsvSource", image_size=32)
    train, test = open_source(config, "train"), open_source(config, "test")
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0] * 6 + [1] * 6 and test.labels.tolist() == [0] * 3 + [1] * 3
    assert (train.name(0), test.name(3)) == ("train/a/000.png", "val/b/001.png")
    assert test.read(3) == (lists / "val/b/001.png").read_bytes()


def test_the_network_is_built(package):
    network = models.build(ModelConfig(builder="mypackage.networks:small", arguments={"num_classes": 3, "width": 4}))
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 3)


def test_the_recipe_is_a_whole_run_of_all_of_them(package, lists, tmp_path):
    config = recipe("mypackage.recipes:mine")
    assert (config.name, config.prune.criteria) == ("mine", ("l1", "mypackage.criteria:spread"))
    config = dataclasses.replace(
        config,
        storage=str(tmp_path / "runs"),
        data=dataclasses.replace(config.data, path=str(lists), threads=1),
        prune=dataclasses.replace(config.prune, flops_reduction=0.02),
        search=dataclasses.replace(config.search, images=12, batch_size=12),
        train=dataclasses.replace(config.train, epochs=2, prune_epoch=1, drop_epochs=(), batch_size=6),
    )
    result = prune(config, distributed=False, progress=Silent())
    assert result.summary["flops_reduction"] >= 0.02 and result.summary["metrics"]["images"] == 6
    loaded = load_pruned(result.folder, model=models.build(config.model))
    widths = [loaded[0].out_channels, loaded[2].out_channels]
    assert widths != [16, 32] and loaded(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_the_method_prunes_the_widest_layer(package, lists, tmp_path):
    config = recipe("mypackage.recipes:mine")
    config = dataclasses.replace(
        config,
        storage=str(tmp_path / "runs"),
        data=dataclasses.replace(config.data, path=str(lists), threads=1),
        prune=dataclasses.replace(config.prune, method="mypackage.methods:Widest", iterations=1),
        search=dataclasses.replace(config.search, images=12, batch_size=12),
        train=dataclasses.replace(config.train, epochs=1, prune_epoch=0, drop_epochs=(), batch_size=6),
    )
    result = prune(config, distributed=False, progress=Silent())
    assert [result.model[0].out_channels, result.model[2].out_channels] == [16, 24]  # 32 less a quarter
    with pytest.raises(ConfigError, match=r"costs is not known: run it without --dry-run, or give its class"):
        dry_run(dataclasses.replace(config, name="again"), distributed=False)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("mypackage.methods:Narrowest", r"prune\.method 'mypackage\.methods:Narrowest' cannot be imported"),
        ("mypackage.criteria:spread", r"must be a subclass of laasp_ray\.methods\.PruningMethod"),
    ],
)
def test_a_path_that_names_no_method_is_told_before_anything_starts(package, lists, tmp_path, path, told):
    config = recipe("mypackage.recipes:mine")
    changed = dataclasses.replace(config, prune=dataclasses.replace(config.prune, method=path), storage=str(tmp_path))
    with pytest.raises(ConfigError, match=told):
        prune(changed, distributed=False, progress=Silent())
