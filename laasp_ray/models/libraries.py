"""Networks of timm and of transformers by name, each library an optional one. Nothing is downloaded."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from laasp_ray.config.names import did_you_mean
from laasp_ray.errors import ConfigError

EXTRA = "networks"
"""The optional dependencies that have the libraries."""
_NUM_CLASSES = "num_classes"


class ImageClassifier(nn.Module):
    """A network of transformers, `network`, as one of images (B, 3, H, W) to logits (B, classes)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images, return_dict=True).logits

    def names_all(self, names: Iterable[str]) -> bool:
        """Whether these are names of tensors of this module, not of `network`."""
        return all("network." in name for name in names)


def _of_timm(name: str) -> Callable[..., nn.Module]:
    timm = _library("timm", f"timm.{name}")
    if name not in timm.list_models():
        raise _unknown("timm", name, timm.list_models())
    return functools.partial(_make_of_timm, timm, name)


def _make_of_timm(timm: ModuleType, name: str, **arguments: Any) -> nn.Module:
    if arguments.pop("pretrained", False):
        raise ConfigError(
            f"model.arguments.pretrained is on, which would download weights of timm.{name}: load them from a file, "
            "--pretrained FILE"
        )
    return timm.create_model(name, pretrained=False, **arguments)


def _of_transformers(kind: str) -> Callable[..., nn.Module]:
    """The builder of a type of model, from its configuration's class, whose fields are the builder's arguments."""
    transformers = _library("transformers", f"transformers.{kind}")
    names = importlib.import_module("transformers.models.auto.modeling_auto")
    known = sorted(names.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    if kind not in known:
        raise _unknown("transformers", kind, known)
    return functools.partial(_make_of_transformers, transformers, kind)


def _make_of_transformers(transformers: ModuleType, kind: str, **arguments: Any) -> nn.Module:
    if _NUM_CLASSES in arguments:
        arguments["num_labels"] = arguments.pop(_NUM_CLASSES)
    config = transformers.AutoConfig.for_model(kind)
    unknown = [name for name in arguments if not hasattr(config, name)]
    if unknown:
        raise TypeError(f"{type(config).__name__} has no field {unknown[0]!r}")
    config = transformers.AutoConfig.for_model(kind, **arguments)
    # Attention in single operations, because fused ones do not show which channels they mix.
    network = transformers.AutoModelForImageClassification.from_config(config, attn_implementation="eager")
    return ImageClassifier(network)


def _library(library: str, builder: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ConfigError(
            f"model.builder {builder!r} needs {library}, which cannot be imported ({error}): pip install "
            f"'laasp_ray[{EXTRA}]', on every node"
        ) from error


def _unknown(library: str, name: str, known: list[str]) -> ConfigError:
    builders = [f"{library}.{other}" for other in known]
    hint = did_you_mean(f"{library}.{name}", builders, most=3) or f"known: {', '.join(builders[:20])}, ..."
    return ConfigError(f"unknown model.builder {f'{library}.{name}'!r}: {library} has no such network; {hint}")


OPTIONAL: dict[str, Callable[[str], Callable[..., nn.Module]]] = {"timm": _of_timm, "transformers": _of_transformers}
"""Library -> what gives the builder of one of its networks. Raises ConfigError without the library or the network."""
