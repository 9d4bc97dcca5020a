"""A run's folder is data: what it names is not run, and nothing is downloaded for it."""

import dataclasses
import json
import os
import subprocess
import sys
import urllib.request

import pytest
import torch
from fakes import Silent
from helpers import write_pictures
from whole_runs import on_pictures

from laasp_ray import load_pruned, models, prune
from laasp_ray.cli import main as cli
from laasp_ray.config import ModelConfig
from laasp_ray.data.sources.registry import open_source
from laasp_ray.errors import ArtifactError, ConfigError
from laasp_ray.pruning.plan import Plan
from laasp_ray.run.evaluate import evaluate_run
from laasp_ray.store.artifact import save_pruned
from laasp_ray.store.storage import Storage

UNTIMED = ("--engines", "none")
BUILT, OPENED = [], []


def network(num_classes=3):
    BUILT.append(num_classes)
    return models.build(ModelConfig(builder="cifar.resnet20", arguments={"num_classes": num_classes}))


def source(config, split):
    OPENED.append(split)
    return open_source(dataclasses.replace(config, format="folder"), split)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a network of one's own."""
    top = tmp_path_factory.mktemp("runs")
    pictures = write_pictures(top / "images", side=8, train=12, test=6)
    config = on_pictures(top / "store", pictures, model__builder=f"{__name__}:network", prune__flops_reduction=0.001)
    return prune(config, distributed=False, progress=Silent()).folder


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


def rewritten(folder, file, change):
    path = os.path.join(folder, file)
    with open(path) as opened:
        content = before = opened.read()
    content = json.loads(content)
    change(content)
    with open(path, "w") as opened:
        json.dump(content, opened)
    return lambda: open(path, "w").write(before)


def test_evaluating_a_folder_does_not_run_what_it_names(finished, tmp_path, capsys):
    marker = tmp_path / "was-run"

    def change(content):
        model = content["data"]["config"]["model"]
        model["builder"], model["arguments"] = "os:system", {"command": f"touch {marker}"}

    restore = rewritten(finished, "journal/000001-start.json", change)
    try:
        assert cli.evaluate([finished]) == 2
        error = capsys.readouterr().err
        assert "names the network's builder by import path, 'os:system'" in error and "--trust" in error
        assert not marker.exists()
    finally:
        restore()


def test_evaluating_a_folder_does_not_open_its_data_by_import_path(tmp_path, capsys):
    pictures = write_pictures(tmp_path / "images", side=8, train=12, test=6)
    config = on_pictures(tmp_path / "store", pictures, prune__flops_reduction=0.001)
    folder = prune(config, distributed=False, progress=Silent()).folder

    def change(content):
        content["data"]["config"]["data"]["format"] = f"{__name__}:source"

    rewritten(folder, "journal/000001-start.json", change)
    OPENED.clear()
    for given in ([], ["--data", str(pictures)]):
        assert cli.evaluate([folder, *given]) == 2
        error = capsys.readouterr().err
        assert f"names the data set's format by import path, '{__name__}:source'" in error and "--trust" in error
    assert cli.evaluate([folder, "--format", "folder", *UNTIMED]) == 0
    assert not OPENED
    assert cli.evaluate([folder, "--trust", *UNTIMED]) == 0
    assert cli.evaluate([folder, "--format", f"{__name__}:source", *UNTIMED]) == 0
    assert OPENED == ["test", "test"]
    assert "6 test images" in capsys.readouterr().out


def test_a_format_that_is_none_is_refused(finished, capsys):
    assert cli.evaluate([finished, "--trust", "--format", "parqet"]) == 2
    assert "data.format is 'parqet', must be one of 'auto', 'digits', 'folder'" in capsys.readouterr().err


def test_a_builder_by_import_path_needs_trust(finished, capsys):
    BUILT.clear()
    with pytest.raises(ConfigError, match="import path"):
        evaluate_run(finished)
    assert not BUILT
    assert cli.evaluate([finished, "--trust", *UNTIMED]) == 0
    assert BUILT and "top-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked", [{"weights": "DEFAULT"}, {"pretrained": True}, {"weights": "ResNet18_Weights.DEFAULT"}]
)
def test_arguments_of_a_saved_network_download_nothing(tmp_path, no_download, asked):
    config = ModelConfig(builder="torchvision.resnet18", arguments={"num_classes": 3}, input_shape=(3, 8, 8))
    model = models.build(config)
    save_pruned(Storage.open(str(tmp_path)), model=model, model_config=config, plan=Plan.empty(), metrics={})
    rewritten(tmp_path, "arch.json", lambda content: content["arguments"].update(asked))
    loaded = load_pruned(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_weights_that_were_asked_for_give_their_number_of_classes(no_download):
    asked = ModelConfig(builder="torchvision.resnet18", arguments={"weights": "IMAGENET1K_V1"})
    assert models.build_offline(asked).fc.out_features == 1000
    with pytest.raises(ConfigError, match=r"torchvision has no weights 'NONE' of resnet18"):
        models.build_offline(ModelConfig(builder="torchvision.resnet18", arguments={"weights": "NONE"}))


@pytest.mark.parametrize("builder", ["googlenet", "inception_v3"])
def test_where_weights_make_another_network_it_is_said(tmp_path, no_download, builder):
    config = ModelConfig(builder="torchvision.resnet18", arguments={"num_classes": 3}, input_shape=(3, 8, 8))
    storage = Storage.open(str(tmp_path))
    save_pruned(storage, model=models.build(config), model_config=config, plan=Plan.empty(), metrics={})

    def change(content):
        content.update(builder=f"torchvision.{builder}", arguments={"weights": "DEFAULT"})

    rewritten(tmp_path, "arch.json", change)
    with pytest.raises(ArtifactError, match=r"would download weights.*load_pruned\(folder, model=\.\.\.\)"):
        load_pruned(tmp_path)


CODE = """
import sys
from laasp_ray import load_pruned
from laasp_ray.config import ModelConfig
from laasp_ray.models import build
model = build(ModelConfig(builder="cifar.resnet20", arguments={"num_classes": 3}))
load_pruned(sys.argv[1], model=model)
build(ModelConfig(builder="zoo.mobilenet_v1"))
build(ModelConfig(builder="cifar.vgg16"))
heavy = {"torchvision", "ray", "pyarrow", "torch_pruning", "fvcore", "nvidia.dali", "PIL", "sklearn", "rich"}
found = sorted(heavy & set(sys.modules))
assert not found, found
"""


def test_a_network_of_ones_own_is_loaded_with_torch_and_safetensors_only(finished):
    assert subprocess.run([sys.executable, "-c", CODE, finished]).returncode == 0
