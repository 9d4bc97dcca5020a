import math
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from laasp_ray.config import ModelConfig
from laasp_ray.errors import ConfigError
from laasp_ray.models import build, load_pretrained, load_weights

CHECKPOINTS = Path(__file__).parents[3] / ".." / "shared" / "data" / "checkpoints"


def tiny(width=2):
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))


def no_module():
    return 3


def make(builder, **arguments):
    return build(ModelConfig(builder=builder, arguments=arguments))


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("resnet20_epoch100", "cifar.resnet20"),
        ("resnet20_epoch130", "cifar.resnet20"),
        ("resnet32_epoch50", "cifar.resnet32"),
        ("resnet56_epoch60", "cifar.resnet56"),
    ],
)
def test_the_authors_checkpoints_load_strictly(name, network):
    path = CHECKPOINTS / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"the shared checkpoint {path.name} is not here")
    model = make(network)
    load_weights(model, path)
    stored = safetensors.torch.load_file(path)
    assert all(torch.equal(tensor, stored[key]) for key, tensor in model.state_dict().items())


def test_cifar_networks_by_depth():
    for depth in (20, 32, 56, 110):
        model = make(f"cifar.resnet{depth}")
        layers = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n]
        assert len(layers) == depth
    assert sum(p.numel() for p in make("cifar.resnet20", num_classes=7).parameters()) == 272474 - 3 * 65
    assert make("cifar.resnet20")(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_arguments_reach_torchvision_without_downloading():
    model = make("torchvision.mobilenet_v2", num_classes=11, width_mult=0.25)
    assert model.classifier[1].out_features == 11


def test_building_follows_the_seed():
    torch.manual_seed(5)
    first = make("cifar.resnet20")
    torch.manual_seed(5)
    second = make("cifar.resnet20")
    torch.manual_seed(6)
    third = make("cifar.resnet20")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.conv1.weight, third.conv1.weight)


def test_import_path():
    assert make(f"{__name__}:tiny", width=5)[0].out_features == 5


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        ("torchvision.resnet51", "did you mean torchvision.resnet50"),
        ("cifar.resnet21", "did you mean .*cifar.resnet20"),
        ("zzz", "known: cifar.resnet110, .*torchvision.vgg16"),
        ("nowhere:f", "cannot be imported"),
        (f"{__name__}:nothing", "cannot be imported"),
        (f"{__name__}:CHECKPOINTS", "must be a function"),
        (f"{__name__}:no_module", "gave a int"),
    ],
)
def test_bad_builders(builder, message):
    with pytest.raises(ConfigError, match=message):
        make(builder)


@pytest.mark.parametrize("builder", ["cifar.resnet20", "torchvision.resnet18"])
def test_bad_arguments(builder):
    with pytest.raises(ConfigError, match=r"does not take model.arguments.*'colour'"):
        make(builder, colour=1)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
    ],
)
def test_torch_files(tmp_path, wrap):
    source, target = tiny(), tiny()
    torch.save(wrap(source.state_dict()), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_prefix_in_safetensors(tmp_path):
    source, target = tiny(), tiny()
    safetensors.torch.save_file({f"module.{k}": v for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(source[0].weight, target[0].weight)


def test_keys_that_do_not_fit_are_named_and_nothing_is_loaded(tmp_path):
    model = tiny()
    before = model[1].bias.clone()
    state = {key: torch.full_like(value, math.pi) for key, value in model.state_dict().items()}
    state["0.weight"] = torch.zeros(4, 3)
    state["extra"] = state.pop("0.bias")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ConfigError) as caught:
        load_weights(model, tmp_path / "w.pt")
    message = str(caught.value)
    assert "1 missing (0.bias)" in message
    assert "1 unexpected (extra)" in message
    assert "0.weight: (4, 3) in the file, (2, 3) in the network" in message
    assert torch.equal(model[1].bias, before)


class Sneaky:
    def __reduce__(self):
        return (print, ("run",))


def test_unreadable_files(tmp_path, capsys):
    with pytest.raises(ConfigError, match="no file of weights"):
        load_weights(tiny(), tmp_path / "none.pt")
    for name in ("junk.pt", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ConfigError, match="cannot be read as weights"):
            load_weights(tiny(), tmp_path / name)
    torch.save({"a": Sneaky()}, tmp_path / "code.pt")
    with pytest.raises(ConfigError, match=r"would run code \(it names print\).*torch.save\(model.state_dict"):
        load_weights(tiny(), tmp_path / "code.pt")
    assert "run" not in capsys.readouterr().out
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="holds no state dict"):
        load_weights(tiny(), tmp_path / "other.pt")


def test_vgg16_for_cifar():
    model = make("cifar.vgg16", num_classes=7)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    linear = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(convolutions) == 13 and linear == [(512, 512), (512, 7)]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


RESNET18 = ModelConfig(builder="torchvision.resnet18", arguments={"num_classes": 1000})
FILE = "resnet18-f37072fd.pth"
"""What torchvision calls the weights IMAGENET1K_V1 of resnet18; those in the cache are not fetched."""


def test_torchvisions_weights_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    source, target = build(RESNET18), build(RESNET18)
    torch.save(source.state_dict(), tmp_path / "hub" / "checkpoints" / FILE)
    load_pretrained(target, RESNET18, "torchvision:IMAGENET1K_V1")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    fewer = ModelConfig(builder="torchvision.resnet18", arguments={"num_classes": 10})
    with pytest.raises(ConfigError, match=r"weights in torchvision:IMAGENET1K_V1 do not fit .*fc\.bias: \(1000,\)"):
        load_pretrained(build(fewer), fewer, "torchvision:IMAGENET1K_V1")


def test_torchvisions_weights_that_cannot_be_fetched(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=rf"torchvision:IMAGENET1K_V1 cannot be had .*{FILE} .*--pretrained FILE"):
        load_pretrained(build(RESNET18), RESNET18, "torchvision:IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("builder", "name", "message"),
    [
        ("torchvision.resnet18", "IMAGENET1K_V2", "no weights 'IMAGENET1K_V2' of resnet18; it has: torchvision:.*_V1"),
        ("cifar.resnet20", "IMAGENET1K_V1", "model.builder 'cifar.resnet20' is none of torchvision's: name a file"),
        (f"{__name__}:tiny", "IMAGENET1K_V1", "is none of torchvision's"),
    ],
)
def test_torchvisions_weights_that_there_are_none_of(builder, name, message):
    config = ModelConfig(builder=builder)
    with pytest.raises(ConfigError, match=message):
        load_pretrained(build(config), config, f"torchvision:{name}")


def test_a_file_where_weights_by_name_could_stand(tmp_path):
    source, target = tiny(), tiny()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_pretrained(target, ModelConfig(builder=f"{__name__}:tiny"), str(tmp_path / "w.pt"))
    assert torch.equal(source[0].weight, target[0].weight)


@pytest.mark.parametrize(
    ("builder", "arguments"),
    [
        ("timm.mobilenetv4_conv_small", {}),
        ("timm.convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]}),
        ("transformers.resnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
        ("transformers.vit", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                              "intermediate_size": 24, "image_size": 32, "patch_size": 8}),
    ],
)  # fmt: skip
def test_networks_of_other_libraries_by_name(builder, arguments):
    pytest.importorskip(builder.partition(".")[0])
    model = make(builder, num_classes=7, **arguments).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        ("timm.resnet5", {}, r"timm has no such network; did you mean timm.resnet5"),
        ("transformers.resnett", {}, r"transformers has no such network; did you mean transformers.resnet"),
        ("transformers.resnet", {"colour": 1}, r"does not take model.arguments .*ResNetConfig has no field 'colour'"),
        ("timm.resnet18", {"colour": 1}, r"does not take model.arguments .*'colour'"),
        ("timm.resnet18", {"pretrained": True}, r"would download weights of timm.resnet18: load them from a file"),
        ("zzz", {}, r"zoo.mobilenet_v1, timm.NAME, transformers.NAME"),
    ],
)
def test_names_and_arguments_that_the_libraries_do_not_have(builder, arguments, message):
    if builder.partition(".")[0] in ("timm", "transformers"):
        pytest.importorskip(builder.partition(".")[0])
    with pytest.raises(ConfigError, match=message):
        make(builder, **arguments)


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ConfigError, match=r"'timm.resnet18' needs timm, .*pip install 'laasp_ray\[networks\]', on every"
    ):
        make("timm.resnet18")


def test_weights_of_transformers_load_under_their_own_names_and_under_ours(tmp_path):
    pytest.importorskip("transformers")
    arguments = {"num_classes": 3, "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    source = make("transformers.resnet", **arguments)
    for number, state in enumerate((source.network.state_dict(), source.state_dict())):
        safetensors.torch.save_file(state, tmp_path / f"{number}.safetensors")
        target = make("transformers.resnet", **arguments)
        load_weights(target, tmp_path / f"{number}.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
