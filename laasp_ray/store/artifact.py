"""Writes and reads a pruned network: `model.safetensors`, `arch.json`, `plan.json`, `metrics.json` in one folder, and
what is made for others beside them (`model_card.md`, `model.onnx`).

Reading it needs torch, safetensors and the network's builder. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laasp_ray import models
from laasp_ray.config import ModelConfig
from laasp_ray.config.names import is_import_path
from laasp_ray.errors import ArtifactError, LaaspError, StoreError
from laasp_ray.models.suitable import EXTRA_STATE
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.records import to_json
from laasp_ray.store.checkpoint import pack_tensors, unpack_tensors
from laasp_ray.store.sparse import compact, expand
from laasp_ray.store.storage import Storage

_WEIGHTS, _ARCH, _PLAN, METRICS = "model.safetensors", "arch.json", "plan.json", "metrics.json"
ARCH_VERSION = 1
"""Of `arch.json`; a reader of another version refuses it."""
EXPORTS = ("model.onnx", "model.pt2")
"""What may be made of the network for other programs; no reader here needs them."""
_FOLDER = "pruned"
_SHOWN = 5


@dataclass(frozen=True)
class Arch:
    """The architecture of a pruned network.

    `models.build(model_config)` makes the unpruned network, and `apply_plan` with `plan` prunes it. `shapes`:
    state-dict name -> shape of the parameter or buffer. `sparse`: the names of tensors that are stored as the values
    that group sparsity keeps and their positions.
    """

    model_config: ModelConfig
    plan: Plan
    shapes: Mapping[str, tuple[int, ...]]
    sparse: tuple[str, ...] = ()


def save_pruned(
    storage: Storage,
    *,
    model: nn.Module,
    model_config: ModelConfig,
    plan: Plan,
    metrics: Mapping[str, Any],
    masks: Mapping[str, bytes] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> int:
    """Writes the pruned `model` to `storage`, the folder `pruned/` of a run. `plan` is relative to the unpruned
    network.

    `arch.json` is written last, so it shows that the other files are complete. A tied tensor is written under each of
    its names. For a tensor with a mask (pruning/sparsity/groups.py) only the kept values are written. `files`: name ->
    content of what else goes there; exports of an earlier network are removed. Returns the size of the weights' file in
    bytes. Raises StoreError if a file cannot be written, ArtifactError if the state dict holds something else than
    tensors.
    """
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ArtifactError(
                f"{name} of the network's state dict is a {type(value).__name__}; only tensors can be "
                "saved without pickling: leave the module's extra state out of its state dict"
            )
    masks = masks or {}
    weights = pack_tensors(compact(state, masks), {"format": "pt"})
    if storage.exists(_ARCH):
        storage.delete(_ARCH)
    storage.write(_WEIGHTS, weights)
    storage.write(_PLAN, _json_bytes(plan.to_json()))
    storage.write(METRICS, _json_bytes(metrics))
    for name in EXPORTS:
        if name not in (files or {}) and storage.exists(name):
            storage.delete(name)
    for name, content in (files or {}).items():
        storage.write(name, content)
    storage.write(_ARCH, _json_bytes(_arch(model, model_config, masks)))
    return len(weights)


def _arch(model: nn.Module, config: ModelConfig, sparse: Iterable[str]) -> dict[str, Any]:
    """What `arch.json` holds of a network, whose tensors named `sparse` have masks."""
    return {
        "schema_version": ARCH_VERSION,
        "laasp_ray": _own_version(),
        "builder": config.builder,
        "arguments": config.arguments,
        "input_shape": config.input_shape,
        "tensors": {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in model.state_dict().items()
        },
        "sparse": list(sparse),
        "layers": {
            name: {
                "type": f"{type(module).__module__}.{type(module).__qualname__}",
                "attributes": _plain_attributes(module),
            }
            for name, module in model.named_modules()
        },
    }


def load_pruned(folder: str | Path | Storage, model: nn.Module | None = None) -> nn.Module:
    """The pruned network of a run, on the CPU and in evaluation mode.

    `folder` is a run's or its `pruned/`, local or on object storage. `model` is the unpruned network, for networks that
    are not in the zoo. It is pruned in place, its weights are replaced, and it is returned. Raises ArtifactError if
    files are missing, have another schema version, or do not fit the network.
    """
    storage = pruned_folder(folder)
    arch = _read_arch(storage)
    network = _build(storage, arch.model_config) if model is None else model
    try:
        apply_plan(network, arch.plan)
    except LaaspError as error:
        given = f"the builder {arch.model_config.builder!r}" if model is None else "the model that was given"
        raise ArtifactError(
            f"the plan in {storage.uri} does not fit {given}: {error}; it must be the unpruned network "
            "that the run began with"
        ) from error
    try:
        tensors, _ = unpack_tensors(storage.read(_WEIGHTS), f"{_WEIGHTS} in {storage.uri}")
        tensors = expand(tensors, arch.shapes, arch.sparse)
    except StoreError as error:
        raise ArtifactError(str(error)) from error
    except ArtifactError as error:
        raise ArtifactError(f"{_WEIGHTS} in {storage.uri} is damaged: {error}; restore it from a copy") from error
    saved = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if saved != arch.shapes:
        raise ArtifactError(
            f"{_WEIGHTS} and {_ARCH} in {storage.uri} are not of one save: "
            f"{_differences(arch.shapes, saved)}; save the network again or restore the folder"
        )
    _load_strictly(network, tensors, storage)
    return network.eval()


def read_arch(folder: str | Path | Storage) -> Arch:
    """The architecture of a run's pruned network, without its weights. Raises the errors of `load_pruned`."""
    return _read_arch(pruned_folder(folder))


def pruned_folder(folder: str | Path | Storage) -> Storage:
    """The folder of a run that holds `arch.json`: the given one, or `pruned` in it."""
    try:
        given = folder if isinstance(folder, Storage) else Storage.open(str(folder))
        for storage in (given, given.child(_FOLDER)):
            if storage.exists(_ARCH):
                return storage
    except StoreError as error:
        raise ArtifactError(str(error)) from error
    raise ArtifactError(
        f"no {_ARCH} in {given.uri} nor in its folder {_FOLDER}; name a finished run's folder "
        "(an unfinished run goes on when it is started again with the same name)"
    )


def _read_arch(storage: Storage) -> Arch:
    content = _read_json(storage, _ARCH)
    version = content.get("schema_version")
    if version != ARCH_VERSION:
        raise ArtifactError(
            f"{_ARCH} in {storage.uri} has schema version {version!r}, this laasp_ray reads "
            f"{ARCH_VERSION}; it was written by laasp_ray {content.get('laasp_ray')}: use that one"
        )
    try:
        config = ModelConfig(
            builder=content["builder"], arguments=content["arguments"], input_shape=tuple(content["input_shape"])
        )
        shapes = {name: tuple(entry["shape"]) for name, entry in content["tensors"].items()}
        sparse = tuple(content.get("sparse", ()))  # earlier versions have no such key
        return Arch(config, Plan.from_json(_read_json(storage, _PLAN)), shapes, sparse)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{_ARCH} in {storage.uri} is damaged ({error!r}); restore it from a copy") from error
    except ArtifactError:
        raise
    except LaaspError as error:
        raise ArtifactError(f"the description in {storage.uri} cannot be used: {error}") from error


def _read_json(storage: Storage, name: str) -> dict[str, Any]:
    try:
        return storage.read_json(name)
    except StoreError as error:
        raise ArtifactError(str(error)) from error


def _build(storage: Storage, config: ModelConfig) -> nn.Module:
    """Builds the zoo's network. It calls no function named by an import path and downloads nothing: a file must not
    choose which code runs.
    """
    if is_import_path(config.builder):
        raise ArtifactError(
            f"the network in {storage.uri} was built by {config.builder!r}, not one of the zoo; "
            "call it yourself and hand the network over: load_pruned(folder, model=...)"
        )
    try:
        return models.build_offline(config)
    except Exception as error:  # a damaged file may hold any arguments
        raise ArtifactError(
            f"the builder {config.builder!r} of {storage.uri} cannot make the network: {error}; "
            "make it yourself and hand it over: load_pruned(folder, model=...)"
        ) from error


def _load_strictly(network: nn.Module, tensors: Mapping[str, torch.Tensor], storage: Storage) -> None:
    """Copies `tensors` into `network`, which takes their dtypes. Tied tensors stay tied."""
    own = network.state_dict(keep_vars=True)
    wanted = {name: _shape(name, tensor) for name, tensor in own.items()}
    found = {name: _shape(name, tensor) for name, tensor in tensors.items()}
    if wanted != found:
        raise ArtifactError(
            f"the weights in {storage.uri} do not fit the network: {_differences(wanted, found)}; "
            "is it the network that the run began with, in the same version?"
        )
    for name, tensor in own.items():
        if not name.endswith(EXTRA_STATE) and tensor.dtype != tensors[name].dtype:
            tensor.data = tensor.data.to(tensors[name].dtype)
    network.load_state_dict(tensors, strict=True)


def _shape(name: str, value: torch.Tensor) -> tuple[int, ...]:
    """The shape of a tensor; empty for extra state, which only its module understands."""
    return () if name.endswith(EXTRA_STATE) else tuple(value.shape)


def _differences(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Lists the first few names that are missing, unexpected, or of another shape."""
    kinds = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "other shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        ],
    }
    return "; ".join(f"{kind}: {_first_few(names)}" for kind, names in kinds.items() if names)


def _first_few(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's public attributes that are numbers, strings, or tuples of them."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _json_bytes(value: Any) -> bytes:
    return json.dumps(to_json(value), indent=1, allow_nan=False).encode()


def _own_version() -> str:
    try:
        return metadata.version("laasp_ray")
    except metadata.PackageNotFoundError:  # a working directory that was sent to a cluster is not installed
        return "not installed"
