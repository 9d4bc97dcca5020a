"""Saved networks: rebuilt bit for bit in another process, and refused where they do not fit."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from laasp_ray import models
from laasp_ray.config import ModelConfig
from laasp_ray.errors import ArtifactError
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.store.artifact import load_pruned, read_arch, save_pruned
from laasp_ray.store.storage import Storage

KEPT = (0, 2, 3)
CIFAR = ModelConfig(builder="cifar.resnet20", input_shape=(3, 32, 32))
RESNET = ModelConfig(builder="torchvision.resnet18", arguments={"num_classes": 10}, input_shape=(3, 64, 64))
METRICS = {"macs": 12, "loss": float("nan")}


def inner_plan(block):
    """Three filters are left between the two convolutions of a residual block."""
    norm = {f"{block}.bn1.{name}": {0: (KEPT,)} for name in ("weight", "bias", "running_mean", "running_var")}
    return Plan(
        tensors={f"{block}.conv1.weight": {0: (KEPT,)}, f"{block}.conv2.weight": {1: (KEPT,)}, **norm},
        attributes={
            f"{block}.conv1": {"out_channels": 3},
            f"{block}.bn1": {"num_features": 3},
            f"{block}.conv2": {"in_channels": 3},
        },
        layers={f"{block}.conv1": KEPT},
    )


def pruned(config, plan):
    torch.manual_seed(0)
    model = models.build(config)
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.01)
    apply_plan(model, plan)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """A run's folder with a pruned ResNet-20, and the network."""
    plan = inner_plan("layer1.0")
    model = pruned(CIFAR, plan)
    storage = Storage.open(str(tmp_path / "run" / "pruned"))
    save_pruned(storage, model=model, model_config=CIFAR, plan=plan, metrics=METRICS)
    return tmp_path / "run", model, plan


def rewrite(folder, name, change):
    path = folder / "pruned" / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_fresh_process_rebuilds_it_bit_for_bit(tmp_path):
    for config in (CIFAR, RESNET):
        plan = inner_plan("layer1.0")
        model, images = pruned(config, plan), torch.rand(2, *config.input_shape)
        with torch.no_grad():
            expected = model(images)
        assert expected.isfinite().all() and expected.std() > 0
        storage = Storage.open(str(tmp_path / config.builder / "pruned"))
        save_pruned(storage, model=model, model_config=config, plan=plan, metrics=METRICS)
        torch.save((images, expected), tmp_path / config.builder / "expected.pt")
    code = """
import sys
import torch
torch.set_num_threads(int(sys.argv[1]))
from laasp_ray.store.artifact import load_pruned
expected = {folder: torch.load(folder + "/expected.pt", weights_only=True) for folder in sys.argv[2:]}
def refuse(*_, **__): raise AssertionError("unpickled")
torch.load = refuse
for folder, (images, logits) in expected.items():
    model = load_pruned(folder)
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(images), logits), folder
foreign = {"fvcore", "ray", "pyarrow", "torch_pruning", "nvidia.dali", "rich", "sklearn"} & set(sys.modules)
assert not foreign, foreign
"""
    folders = [str(tmp_path / config.builder) for config in (CIFAR, RESNET)]
    subprocess.run([sys.executable, "-c", code, str(torch.get_num_threads()), *folders], check=True)


def test_a_network_of_the_zoo_is_loaded_with_torch_and_safetensors_only(saved):
    code = """
import sys
from laasp_ray import load_pruned
assert load_pruned(sys.argv[1]).layer1[0].conv1.out_channels == 3
heavy = {"torchvision", "timm", "ray", "pyarrow", "torch_pruning", "fvcore", "nvidia.dali", "PIL", "rich", "scipy"}
found = sorted((heavy | {"onnx", "onnxscript", "onnxruntime", "psutil", "pydantic"}) & set(sys.modules))
assert not found, found
"""
    assert subprocess.run([sys.executable, "-c", code, str(saved[0])]).returncode == 0


def test_exports_of_an_earlier_network_go_and_other_files_come(saved):
    run, model, plan = saved
    folder = run / "pruned"
    storage = Storage.open(str(folder))
    given = {"model.onnx": b"graph", "model_card.md": b"# card"}
    save_pruned(storage, model=model, model_config=CIFAR, plan=plan, metrics={}, files=given)
    assert (folder / "model.onnx").read_bytes() == b"graph" and (folder / "model_card.md").read_bytes() == b"# card"
    save_pruned(storage, model=model, model_config=CIFAR, plan=plan, metrics={}, files={"model.pt2": b"program"})
    assert sorted(path.name for path in folder.glob("model.*")) == ["model.pt2", "model.safetensors"]


def test_weights_buffers_and_shapes_are_those_saved(saved):
    run, model, plan = saved
    for folder in (run, run / "pruned", str(run)):
        loaded = load_pruned(folder)
        assert loaded.layer1[0].conv1.weight.shape[0] == 3 and loaded.layer1[0].conv1.out_channels == 3
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    arch = read_arch(run)
    assert arch.model_config == CIFAR and arch.plan == plan
    assert arch.shapes["layer1.0.conv2.weight"] == (16, 3, 3, 3)


def test_the_files_say_what_they_are(saved):
    run, model, plan = saved
    assert sorted(path.name for path in (run / "pruned").iterdir()) == [
        "arch.json",
        "metrics.json",
        "model.safetensors",
        "plan.json",
    ]
    arch = json.loads((run / "pruned" / "arch.json").read_text())
    assert (arch["schema_version"], arch["builder"], arch["arguments"], arch["input_shape"]) == (
        1,
        "cifar.resnet20",
        {},
        [3, 32, 32],
    )
    assert arch["tensors"]["layer1.0.conv1.weight"] == {"shape": [3, 16, 3, 3], "dtype": "float32"}
    assert arch["tensors"]["bn1.num_batches_tracked"] == {"shape": [], "dtype": "int64"}
    layer = arch["layers"]["layer1.0.conv1"]
    assert layer["type"] == "torch.nn.modules.conv.Conv2d" and layer["attributes"]["out_channels"] == 3
    assert layer["attributes"]["kernel_size"] == [3, 3]
    assert Plan.from_json(json.loads((run / "pruned" / "plan.json").read_text())) == plan
    assert json.loads((run / "pruned" / "metrics.json").read_text()) == {"macs": 12, "loss": "nan"}
    import safetensors.torch

    assert safetensors.torch.load_file(run / "pruned" / "model.safetensors").keys() == model.state_dict().keys()


def test_a_model_of_ones_own_is_pruned_in_place(saved):
    run, model, _ = saved
    fresh = models.build(CIFAR)
    assert load_pruned(run, model=fresh) is fresh and not fresh.training
    assert torch.equal(fresh.layer1[0].conv1.weight, model.layer1[0].conv1.weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_tied_weights_and_half_precision_survive(tmp_path):
    config = ModelConfig(builder="tests:Tied", input_shape=(3, 1, 1))
    model = Tied().bfloat16()
    save_pruned(Storage.open(str(tmp_path)), model=model, model_config=config, plan=Plan(), metrics={})
    loaded = load_pruned(tmp_path, model=Tied())
    assert loaded.first.weight is loaded.second.weight and loaded.first.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.first.weight, model.first.weight)
    with pytest.raises(ArtifactError, match=r"built by 'tests:Tied', not one of the zoo; call it yourself.*model="):
        load_pruned(tmp_path)


def test_object_storage(tmp_path):
    storage = Storage.open("mock:///bucket/pruned")
    plan = inner_plan("layer1.0")
    save_pruned(storage, model=pruned(CIFAR, plan), model_config=CIFAR, plan=plan, metrics={})
    assert storage.list() == ["arch.json", "metrics.json", "model.safetensors", "plan.json"]


def test_arch_is_written_last_and_taken_away_first(saved, monkeypatch):
    run, model, plan = saved
    names = []

    class Watched(Storage):
        def write(self, name, data):
            names.append((name, self.exists("arch.json")))
            super().write(name, data)

    inner = Storage.open(str(run / "pruned"))
    save_pruned(Watched(inner.uri, inner._folder), model=model, model_config=CIFAR, plan=plan, metrics={})
    assert names[-1] == ("arch.json", False) and not any(complete for _, complete in names)


def test_extra_state_that_would_need_pickling_is_refused(tmp_path):
    class Extra(nn.Module):
        def get_extra_state(self):
            return {"anything": 1}

    with pytest.raises(ArtifactError, match=r"_extra_state of the network's state dict is a dict"):
        save_pruned(Storage.open(str(tmp_path)), model=Extra(), model_config=CIFAR, plan=Plan(), metrics={})
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_has_nothing_to_load(tmp_path):
    with pytest.raises(ArtifactError, match=r"no arch.json in .* name a finished run's folder"):
        load_pruned(tmp_path)
    with pytest.raises(ArtifactError, match=r"no arch.json"):
        load_pruned(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
def test_missing_files_are_named(saved, name):
    (saved[0] / "pruned" / name).unlink()
    with pytest.raises(ArtifactError, match=rf"cannot read {name}"):
        load_pruned(saved[0])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("arch.json", lambda c: c.update(schema_version=7), "schema version 7, this laasp_ray reads 1"),
        ("arch.json", lambda c: c.pop("builder"), "arch.json in .* is damaged"),
        ("arch.json", lambda c: c.update(input_shape=[3]), "input_shape"),
        (
            "arch.json",
            lambda c: c.update(builder="cifar.resnet21"),
            "the builder 'cifar.resnet21' .*cannot make.*model=",
        ),
        ("arch.json", lambda c: c.update(arguments={"width": 3}), "cannot make the network"),
        ("arch.json", lambda c: c["tensors"].update(more={"shape": [1]}), "not of one save: missing: more"),
        ("arch.json", lambda c: c.update(builder="os:getcwd"), "built by 'os:getcwd', not one of the zoo"),
        (
            "plan.json",
            lambda c: c["tensors"]["layer1.0.conv1.weight"].update({"0": [[0, 99]]}),
            "does not fit the builder",
        ),
        ("plan.json", lambda c: c.pop("layers"), "cannot be used: not a plan"),
    ],
)
def test_damaged_descriptions_are_refused(saved, name, change, message):
    rewrite(saved[0], name, change)
    with pytest.raises(ArtifactError, match=message):
        load_pruned(saved[0])


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_what_is_not_an_object_is_refused(saved, content):
    (saved[0] / "pruned" / "arch.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"arch.json in"):
        load_pruned(saved[0])


def test_damaged_weights_are_refused(saved):
    path = saved[0] / "pruned" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match=r"model.safetensors in .* is no whole safetensors file"):
        load_pruned(saved[0])


def test_keys_that_do_not_fit_are_named(saved):
    run, _, _ = saved
    with pytest.raises(ArtifactError, match=r"do not fit the network: missing: extra.bias, extra.weight"):
        network = models.build(CIFAR)
        network.add_module("extra", nn.Linear(1, 1))
        load_pruned(run, model=network)
    with pytest.raises(ArtifactError, match=r"does not fit the model that was given"):
        load_pruned(run, model=nn.Linear(1, 1))
    with pytest.raises(ArtifactError, match=r"unexpected: layer3.2.bn1.bias, .* and \d+ more"):
        shallow = models.build(CIFAR)
        del shallow.layer3[2]
        load_pruned(run, model=shallow)
    with pytest.raises(ArtifactError, match=r"other shape: .*\(10, 64\) instead of \(4, 64\)"):
        load_pruned(run, model=models.build(dataclasses.replace(CIFAR, arguments={"num_classes": 4})))
