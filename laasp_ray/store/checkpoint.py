"""Checkpoints of a run: `checkpoints/NAME.safetensors`, with the keys `model/...` and `optimizer_state/...`."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch

from laasp_ray.errors import StoreError
from laasp_ray.store.storage import Storage

UNPRUNED = "unpruned"
"""The checkpoint of the network just before its first prune, or of a network that is never pruned. It is kept for
comparisons.
"""
_FOLDER = "checkpoints"
_SUFFIX = ".safetensors"
_MODEL, _OPTIMIZER_STATE = "model/", "optimizer_state/"


@dataclass(frozen=True)
class Checkpoint:
    """The arguments of `save_checkpoint`, on the CPU. `optimizer_state` is that of an EpochResult (train/loop.py)."""

    model: dict[str, torch.Tensor]
    optimizer_state: dict[str, torch.Tensor]
    metadata: dict[str, str]


def save_checkpoint(
    storage: Storage,
    name: str,
    *,
    model: Mapping[str, torch.Tensor | np.ndarray],
    optimizer_state: Mapping[str, torch.Tensor | np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a checkpoint, completely or not at all. Tensors may be on any device, views of each other, or
    0-dimensional.

    Raises StoreError if it cannot be written, TypeError for a value that is not a tensor or an array.
    """
    tensors = {_MODEL + key: value for key, value in model.items()}
    tensors.update({_OPTIMIZER_STATE + key: value for key, value in (optimizer_state or {}).items()})
    storage.write(_file_name(name), pack_tensors(tensors, dict(metadata or {})))


def has_checkpoint(storage: Storage, name: str) -> bool:
    return storage.exists(_file_name(name))


def load_checkpoint(storage: Storage, name: str) -> Checkpoint:
    """Reads a checkpoint. Raises StoreError, naming it, if it does not exist or its file is damaged."""
    file = _file_name(name)
    tensors, metadata = unpack_tensors(storage.read(file), f"{file} in {storage.uri}")
    parts: dict[str, dict[str, torch.Tensor]] = {_MODEL: {}, _OPTIMIZER_STATE: {}}
    for key, tensor in tensors.items():
        part, _, rest = key.partition("/")
        if part + "/" not in parts:
            raise StoreError(
                f"{file} in {storage.uri} is no checkpoint of laasp_ray: its key {key!r} starts with "
                f"neither {_MODEL!r} nor {_OPTIMIZER_STATE!r}; name another"
            )
        parts[part + "/"][rest] = tensor
    return Checkpoint(parts[_MODEL], parts[_OPTIMIZER_STATE], metadata)


def delete_checkpoints(storage: Storage, keep: Collection[str]) -> None:
    """Removes every checkpoint whose name is not in `keep`, and unfinished files of killed processes."""
    kept = {_file_name(name) for name in keep}
    for file in storage.list(f"{_FOLDER}/"):
        if file.endswith(_SUFFIX) and file not in kept:
            storage.delete(file)
    storage.delete_leftovers(_FOLDER)


def pack_tensors(tensors: Mapping[str, torch.Tensor | np.ndarray], metadata: dict[str, str]) -> bytes:
    """The content of a safetensors file. Every tensor gets its own memory in it; values, dtypes and shapes are kept."""
    seen: set[int] = set()
    packed = {}
    for key, value in tensors.items():
        tensor = _as_tensor(key, value)
        memory = tensor.untyped_storage().data_ptr()
        packed[key] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return safetensors.torch.save(packed, metadata)


def unpack_tensors(raw: bytes, place: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file. Raises StoreError naming `place` if it is damaged."""
    try:
        tensors = safetensors.torch.load(raw)
        (length,) = struct.unpack("<Q", raw[:8])
        metadata = json.loads(raw[8 : 8 + length]).get("__metadata__", {})
    except Exception as error:  # a damaged header can raise many kinds of errors
        raise StoreError(f"{place} is no whole safetensors file ({error}); restore it from a copy") from error
    return tensors, metadata


def _as_tensor(key: str, value: torch.Tensor | np.ndarray) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu").contiguous()
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(value, order="C"))
    raise TypeError(f"{key} is a {type(value).__name__}; a checkpoint holds tensors and arrays only")


def _file_name(name: str) -> str:
    return f"{_FOLDER}/{name}{_SUFFIX}"
