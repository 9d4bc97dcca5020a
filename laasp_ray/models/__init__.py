"""Networks by name: `build` makes one, `load_weights` fills it from a file or with torchvision's weights."""

from __future__ import annotations

import difflib
import functools
import importlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import nn

from laasp_ray.config import ModelConfig
from laasp_ray.errors import ConfigError
from laasp_ray.models.cifar import DEPTHS, CifarResNet
from laasp_ray.models.cifar_vgg import CifarVgg16
from laasp_ray.models.suitable import not_finite
from laasp_ray.models.zoo import ZOO

TORCHVISION = "torchvision:"
"""Begins a name of torchvision's weights, as in torchvision:IMAGENET1K_V2, where a file could be named too."""

_CIFAR: dict[str, Callable[..., nn.Module]] = {
    **{name: functools.partial(CifarResNet, blocks) for name, blocks in DEPTHS.items()},
    "vgg16": CifarVgg16,
}
_SHOWN = 4
"""How many keys an error about a file of weights names."""


def build(config: ModelConfig) -> nn.Module:
    """A new network in training mode, its weights drawn from torch's global generator (seed it first).

    `config.builder` is `torchvision.NAME` (a classification network), `cifar.resnet20` (32, 56, 110), `cifar.vgg16`,
    `zoo.alexnet_grouped`, `zoo.mobilenet_v1`, or the import path `package.module:function` of a function that returns
    an nn.Module; `config.arguments` are passed on. Raises ConfigError for an unknown builder (with the nearest known
    ones) or arguments that it does not take.
    """
    builder, arguments = _builder(config.builder), dict(config.arguments)
    try:
        model = builder(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"model.builder {config.builder!r} does not take model.arguments {arguments}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.builder {config.builder!r} gave a {type(model).__name__}, must give an nn.Module")
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a file of weights into `model`, strictly.

    `.safetensors`, or `.pt`, `.pth`, `.bin` as torch.save wrote it (read without unpickling code): a state dict,
    possibly under "state_dict" or "model", its keys possibly starting with "module.". Raises ConfigError if the file
    is missing or unreadable, naming the first keys that are missing, unexpected or of another shape.
    """
    _fill(model, _read_state(Path(path)), str(path))


def load_pretrained(model: nn.Module, config: ModelConfig, source: str) -> None:
    """Fills `model`, built from `config`, from a file, or with the weights that `torchvision:NAME` names.

    Torchvision's are those of the builder's own architecture; they are downloaded into torch's cache where they are
    not there yet. Raises ConfigError for a name or a builder that has none, a download that fails, and weights that do
    not fit.
    """
    if source.startswith(TORCHVISION):
        state = _torchvision_state(config.builder, source.removeprefix(TORCHVISION))
        # Weights of auxiliary heads that this network is built without, as its None attributes say.
        state = {key: value for key, value in state.items() if getattr(model, key.partition(".")[0], model) is not None}
        _fill(model, state, source)
    else:
        load_weights(model, source)


def _torchvision_state(builder: str, name: str) -> dict[str, torch.Tensor]:
    family, _, architecture = builder.partition(".")
    if ":" in builder or family != "torchvision":
        raise ConfigError(
            f"train.pretrained is {TORCHVISION + name!r}, but model.builder {builder!r} is none of torchvision's: "
            "name a file of weights"
        )
    known = {weights.name: weights for weights in torchvision.models.get_model_weights(architecture)}
    if name not in known:
        offered = ", ".join(TORCHVISION + other for other in known) or "none"
        raise ConfigError(f"torchvision has no weights {name!r} of {architecture}; it has: {offered}")
    try:
        return dict(known[name].get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:  # no network, no room, or not the bytes that were expected
        raise ConfigError(
            f"the weights {TORCHVISION + name} cannot be had ({error}): download {known[name].url} elsewhere and name "
            "the file, --pretrained FILE"
        ) from error


def _fill(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    wanted = model.state_dict()
    if all(key.startswith("module.") for key in state) and not all(key.startswith("module.") for key in wanted):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    misshaped = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(wanted[key].shape)} in the network"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    problems = [
        f"{len(keys)} {kind} ({_first(keys)})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if keys
    ]
    if problems:
        raise ConfigError(
            f"the weights in {source} do not fit the network: {'; '.join(problems)}. "
            f"Check model.builder and model.arguments"
        )
    broken = not_finite(model, state)
    if broken:
        raise ConfigError(
            f"the weights in {source} are not finite (NaN or infinite) in {len(broken)} tensors ({_first(broken)}): "
            "give weights from before they diverged"
        )
    model.load_state_dict(state)


def known_builders() -> list[str]:
    """The names that `build` knows, import paths aside."""
    names = [f"torchvision.{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    return sorted([*names, *(f"cifar.{name}" for name in _CIFAR), *(f"zoo.{name}" for name in ZOO)])


def _builder(name: str) -> Callable[..., Any]:
    if ":" in name:
        return _imported(name)
    if name not in known_builders():
        close = difflib.get_close_matches(name, known_builders(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known_builders())}"
        raise ConfigError(f"unknown model.builder {name!r}; {hint} (or an import path, package.module:function)")
    family, _, architecture = name.partition(".")
    if family == "cifar":
        return _CIFAR[architecture]
    if family == "zoo":
        return ZOO[architecture]
    return lambda **arguments: torchvision.models.get_model(architecture, **{"weights": None, **arguments})


def _imported(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"model.builder {path!r} cannot be imported ({error}); it must read package.module:function"
        ) from error
    if not callable(found):
        raise ConfigError(f"model.builder {path!r} is a {type(found).__name__}, must be a function")
    return found


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ConfigError(f"no file of weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{path} cannot be read as weights: {reason}. It must be a .safetensors file or a state dict "
            f"saved by torch.save"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ConfigError(
            f"{path} holds no state dict; expected names mapped to tensors, possibly under 'state_dict' or 'model'"
        )
    return dict(content)


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
