"""Networks by name: `build` makes one, and `load_weights` fills it from a file or with torchvision's weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laasp_ray.config import ModelConfig
from laasp_ray.config.names import did_you_mean, imported, is_import_path
from laasp_ray.errors import ConfigError
from laasp_ray.models.alexnet import AlexNetGrouped
from laasp_ray.models.cifar_resnet import DEPTHS, CifarResNet
from laasp_ray.models.cifar_vgg import CifarVgg16
from laasp_ray.models.libraries import OPTIONAL, ImageClassifier
from laasp_ray.models.mobilenet_v1 import MobileNetV1
from laasp_ray.models.weights import fill, read_state

TORCHVISION = "torchvision:"
"""The prefix of a name of torchvision's weights, such as torchvision:IMAGENET1K_V2, where a file path is also allowed.
"""

_CIFAR: dict[str, Callable[..., nn.Module]] = {
    **{name: functools.partial(CifarResNet, blocks) for name, blocks in DEPTHS.items()},
    "vgg16": CifarVgg16,
}
_ZOO: dict[str, Callable[..., nn.Module]] = {"alexnet_grouped": AlexNetGrouped, "mobilenet_v1": MobileNetV1}
_WEIGHTS = ("weights", "pretrained")
"""Prefixes of the arguments that make torchvision's builders download weights (weights_backbone is one of them)."""
_OTHER_FORWARD = ("googlenet", "inception_v3")
"""Builders that make a different network, not only different weights, if the arguments ask for weights."""


def build(config: ModelConfig) -> nn.Module:
    """A new network in training mode. Its weights are drawn from torch's global generator, so seed it first.

    `config.builder` is `torchvision.NAME` (a classification network), `timm.NAME`, `transformers.TYPE` (a type of model
    that classifies images, such as resnet), `cifar.resnet20` (32, 56, 110), `cifar.vgg16`, `zoo.alexnet_grouped`,
    `zoo.mobilenet_v1`, or the import path `package.module:function` of a function that returns
    an nn.Module. `config.arguments` are passed to it. Raises ConfigError for an unknown builder (with the nearest known
    ones) or arguments that it does not accept.
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


def build_offline(config: ModelConfig) -> nn.Module:
    """As `build`, for a config that came with a saved file: the same network, but nothing is downloaded.

    Its weights are random even if the arguments ask for weights; the caller loads the file's own. Raises ConfigError as
    `build` does, and also if the arguments that ask for weights change what the network computes.
    """
    family, _, architecture = config.builder.partition(".")
    if family != "torchvision" or is_import_path(config.builder):
        return build(config)
    asked = {key: value for key, value in config.arguments.items() if key.startswith(_WEIGHTS) and value}
    arguments = {key: value for key, value in config.arguments.items() if not key.startswith(_WEIGHTS)}
    if asked and architecture in _OTHER_FORWARD:
        raise ConfigError(
            f"model.arguments {asked} would download weights, and {config.builder} is another network without them"
        )
    _builder(config.builder)  # raises for an unknown name
    weights = next(iter(asked.values()), None)
    if weights is not None and "num_classes" not in arguments:
        arguments["num_classes"] = _classes_of(architecture, weights)
    return build(replace(config, arguments=arguments))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a file of weights into `model`, strictly.

    The file is `.safetensors`, or `.pt`, `.pth`, `.bin` as written by torch.save (read without unpickling code). It
    holds a state dict, possibly under a key such as "state_dict" or "model". Its names may have the prefix of a wrapper
    ("module.", "_orig_mod.", "model."), and BatchNorm's num_batches_tracked may be missing. Raises ConfigError if the
    file is missing or unreadable. It names the first keys that are missing, unexpected or of another shape.
    """
    state = read_state(Path(path))
    if isinstance(model, ImageClassifier) and not model.names_all(state):
        model = model.network  # a file of transformers' own
    fill(model, state, str(path))


def load_pretrained(model: nn.Module, config: ModelConfig, source: str) -> None:
    """Fills `model`, built from `config`, from a file, or with the weights that `torchvision:NAME` names.

    Torchvision's weights are those of the builder's own architecture. They are downloaded into torch's cache if they
    are not there yet. Raises ConfigError for an unknown name, a builder without such weights, a failed download, and
    weights that do not fit.
    """
    if source.startswith(TORCHVISION):
        state = _torchvision_state(config.builder, source.removeprefix(TORCHVISION))
        # Weights of auxiliary heads are dropped if this network has no such heads (its attributes are None).
        state = {key: value for key, value in state.items() if getattr(model, key.partition(".")[0], model) is not None}
        fill(model, state, source)
    else:
        load_weights(model, source)


def _torchvision_state(builder: str, name: str) -> dict[str, torch.Tensor]:
    family, _, architecture = builder.partition(".")
    if is_import_path(builder) or family != "torchvision":
        raise ConfigError(
            f"train.pretrained is {TORCHVISION + name!r}, but model.builder {builder!r} is none of torchvision's: "
            "name a file of weights"
        )
    import torchvision  # most networks, and all networks of a user's own, do not need it

    known = {weights.name: weights for weights in torchvision.models.get_model_weights(architecture)}
    if name not in known:
        offered = ", ".join(TORCHVISION + other for other in known) or "none"
        raise ConfigError(f"torchvision has no weights {name!r} of {architecture}; it has: {offered}")
    try:
        return dict(known[name].get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:  # no connection, no disk space, or a damaged download
        raise ConfigError(
            f"the weights {TORCHVISION + name} cannot be had ({error}): download {known[name].url} elsewhere and name "
            "the file, --pretrained FILE"
        ) from error


def known_builders() -> list[str]:
    """The names that `build` knows, without import paths and those of the libraries in libraries.py."""
    import torchvision

    names = [f"torchvision.{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    return sorted([*names, *(f"cifar.{name}" for name in _CIFAR), *(f"zoo.{name}" for name in _ZOO)])


def _builder(name: str) -> Callable[..., Any]:
    if is_import_path(name):
        return imported(name, "model.builder")
    family, _, architecture = name.partition(".")
    if family == "cifar" and architecture in _CIFAR:
        return _CIFAR[architecture]
    if family == "zoo" and architecture in _ZOO:
        return _ZOO[architecture]
    if family in OPTIONAL:
        return OPTIONAL[family](architecture)
    if name not in known_builders():
        hint = did_you_mean(name, known_builders(), most=3) or f"known: {', '.join(known_builders())}"
        hint += f", {', '.join(f'{library}.NAME' for library in OPTIONAL)}"
        raise ConfigError(f"unknown model.builder {name!r}; {hint} (or an import path, package.module:function)")
    return functools.partial(_of_torchvision, architecture)


def _of_torchvision(architecture: str, **arguments: Any) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(architecture, **{"weights": None, **arguments})


def _classes_of(architecture: str, weights: object) -> int | None:
    """The number of classes of torchvision's network, if it is built with these weights and no number of classes is
    given.
    """
    from torchvision.models import get_model_weights

    known = get_model_weights(architecture)
    try:
        found = known[str(weights).rpartition(".")[2]] if isinstance(weights, str) else next(iter(known))
    except (KeyError, StopIteration):
        raise ConfigError(f"torchvision has no weights {weights!r} of {architecture}") from None
    return len(found.meta["categories"])
