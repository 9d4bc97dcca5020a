"""Files of weights: reads them without running code, unwraps them, and adapts them to a network's names."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from laasp_ray.errors import ConfigError
from laasp_ray.models.suitable import not_finite

_WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "net", "ema", "model_ema")
"""The keys under which training scripts store a state dict, in the order in which they are tried."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes that wrappers put before every name: (Distributed)DataParallel and averages, torch.compile, Lightning."""
_BATCHES, _MEAN = "num_batches_tracked", "running_mean"
_DEPTH = 3
_SHOWN = 4
"""The number of keys that an error about a file of weights names."""
_GLOBAL = re.compile(r"\bGLOBAL ([\w.]+)")
_SAVE = (
    "where the file was made, or where you trust it, load it and save the weights alone, with "
    "torch.save(model.state_dict(), FILE) or safetensors.torch.save_file(model.state_dict(), FILE)"
)


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file. Raises ConfigError, naming the file, if it cannot be read as one."""
    if not path.is_file():
        raise ConfigError(f"no file of weights at {path}: give its path with --pretrained (train.pretrained)")
    content = _read(path)
    for _ in range(_DEPTH):
        wrapped = content if isinstance(content, Mapping) else {}
        content = next((wrapped[key] for key in _WRAPPERS if isinstance(wrapped.get(key), Mapping)), content)
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())
    ):
        raise ConfigError(
            f"{path} holds no state dict; expected names mapped to tensors, possibly under "
            + ", ".join(map(repr, _WRAPPERS))
        )
    return dict(content)


def fill(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Loads `state` into `model`, completely or not at all. Raises ConfigError naming the keys that do not fit."""
    wanted = model.state_dict()
    fitted = _fitted(state, wanted)
    missing = sorted(wanted.keys() - fitted.keys())
    unexpected = sorted(fitted.keys() - wanted.keys())
    misshaped = [
        f"{key}: {tuple(fitted[key].shape)} in the file, {tuple(wanted[key].shape)} in the network"
        for key in wanted
        if key in fitted and fitted[key].shape != wanted[key].shape
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
    broken = not_finite(model, fitted)
    if broken:
        raise ConfigError(
            f"the weights in {source} are not finite (NaN or infinite) in {len(broken)} tensors ({_first(broken)}): "
            "give weights from before they diverged"
        )
    kept = {key: value.clone() for key, value in wanted.items()}
    try:
        model.load_state_dict(fitted)
    except Exception as error:  # some tensors cannot be copied, for example those without values
        model.load_state_dict(kept)
        raise ConfigError(f"the weights in {source} cannot be copied into the network: {_line(error)}") from error


def _fitted(state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` without the prefixes of wrappers. BatchNorm's counts are added where they are missing."""
    found = {key: value for key, value in state.items() if key != "n_averaged" or key in wanted}
    changed = True
    while changed:
        changed = False
        for prefix in _PREFIXES:
            if _all_start(found, prefix) and not _all_start(wanted, prefix):
                found = {key.removeprefix(prefix): value for key, value in found.items()}
                changed = True
    for key, value in wanted.items():
        if _is_count(key) and key not in found and _mean_of(key) in found:
            found[key] = torch.zeros_like(value)  # the file is from before torch 0.4.1, or from another library
    return {
        key: value for key, value in found.items() if key in wanted or not _is_count(key) or _mean_of(key) not in wanted
    }


def _all_start(names: Mapping[str, Any], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) and name != prefix for name in names)


def _is_count(key: str) -> bool:
    return key.rpartition(".")[2] == _BATCHES


def _mean_of(key: str) -> str:
    return key.removesuffix(_BATCHES) + _MEAN


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says what torch's warnings say of damaged files
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds of errors
        raise _refused(path, error) from None  # torch's message advises to let the file run its code


def _refused(path: Path, error: Exception) -> ConfigError:
    if _is_torchscript(path):
        return ConfigError(f"{path} is a TorchScript archive, which holds code beside its weights: {_SAVE}")
    blocked = _GLOBAL.search(str(error))
    if blocked is not None and path.suffix != ".safetensors":
        return ConfigError(
            f"{path} holds more than tensors, and reading it would run code (it names {blocked.group(1)}), which is "
            f"not done: {_SAVE}"
        )
    return ConfigError(
        f"{path} cannot be read as weights: it is damaged or of another kind ({_line(error)}). It must be a "
        ".safetensors file or a state dict saved by torch.save"
    )


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:
        return False


def _line(error: Exception) -> str:
    """The first line of an error. If that line gives advice, the type of the error instead."""
    text = str(error).strip().splitlines()[:1]
    return text[0] if text and "weights" not in text[0].lower() else type(error).__name__


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
