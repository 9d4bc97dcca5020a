"""Weights on the way: `checkpoints/NAME.safetensors`, with the keys `model/...` and `optimizer_state/...`.

A name carries the attempt that wrote it (store/ownership.py), so that none overwrites another's.
"""

from __future__ import annotations

import hashlib
import json
import re
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
WEIGHTS = "weights/"
"""The folder of the tensors that iterations changed."""
RACES = "races/"
"""The folder of what races leave to the next ones (search/race_memory.py)."""
_SUFFIX = ".safetensors"
_MODEL, _OPTIMIZER_STATE = "model/", "optimizer_state/"
_ATTEMPT = re.compile(r"(?:^|/)\d{6,}-a(\d+)$")


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
) -> dict[str, str]:
    """Writes a checkpoint, whole or not at all, and gives its file with the digest (sha256) of what is in it. Tensors
    may be on any device, views of each other, or 0-dimensional.

    Raises StoreError if it cannot be written, TypeError for a value that is not a tensor or an array.
    """
    tensors = {_MODEL + key: value for key, value in model.items()}
    tensors.update({_OPTIMIZER_STATE + key: value for key, value in (optimizer_state or {}).items()})
    packed = pack_tensors(tensors, dict(metadata or {}))
    storage.write(checkpoint_file(name), packed)
    return {checkpoint_file(name): digest_of(packed)}


def numbered_name(number: int, attempt: int) -> str:
    """The name of what `attempt` writes for an epoch or an iteration; the first attempt's is the bare number."""
    return f"{number:06d}-a{attempt}" if attempt > 1 else f"{number:06d}"


def has_checkpoint(storage: Storage, name: str) -> bool:
    return storage.exists(checkpoint_file(name))


def load_checkpoint(storage: Storage, name: str, digests: Mapping[str, str] | None = None) -> Checkpoint:
    """Raises StoreError if there is no such checkpoint or its file is damaged, naming it: also if the file is not what
    `digests`, of the event that speaks of it, has under its name."""
    file = checkpoint_file(name)
    tensors, metadata = unpack_tensors(checked_digest(storage, file, digests), f"{file} in {storage.uri}")
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


def delete_checkpoints(
    storage: Storage, keep: Collection[str], attempt: int | None = None, since: int | None = None
) -> None:
    """Removes every checkpoint whose name is not in `keep`, and what killed processes left half written.

    Those of attempts after `attempt` stay: another driver has taken over and needs them. With `since`, those of earlier
    epochs and those without a number stay, too.
    """
    kept = {checkpoint_file(name) for name in keep}
    for file in storage.list(f"{_FOLDER}/"):
        name = file.removeprefix(f"{_FOLDER}/").removesuffix(_SUFFIX)
        later = attempt is not None and attempt_of(name) > attempt
        earlier = since is not None and not (name[:6].isdecimal() and int(name[:6]) >= since)
        if file.endswith(_SUFFIX) and file not in kept and not later and not earlier:
            storage.delete(file)
    storage.delete_leftovers(_FOLDER)


def save_tensors(
    storage: Storage, folder: str, iteration: int, tensors: Mapping[str, torch.Tensor], attempt: int = 1
) -> dict[str, str]:
    """Writes an iteration's tensors as `FOLDER/NNNNNN.safetensors`; gives the file with its digest. None: no file."""
    if not tensors:
        return {}
    packed = pack_tensors(tensors, {})
    file = f"{folder}{numbered_name(iteration, attempt)}{_SUFFIX}"
    storage.write(file, packed)
    return {file: digest_of(packed)}


def load_tensors(storage: Storage, file: str, digests: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of such a file; none if `file` is empty. Raises StoreError if it is gone or damaged."""
    if not file:
        return {}
    return unpack_tensors(checked_digest(storage, file, digests), f"{file} in {storage.uri}")[0]


def delete_tensors(storage: Storage, keep: Collection[str], attempt: int) -> None:
    """Removes such files of WEIGHTS and RACES that are not in `keep`, but for those of later attempts."""
    for file in [*storage.list(WEIGHTS), *storage.list(RACES)]:
        if file.endswith(_SUFFIX) and file not in keep and attempt_of(file.removesuffix(_SUFFIX)) <= attempt:
            storage.delete(file)


def attempt_of(name: str) -> int:
    """The attempt that wrote a file of this name (without its ending)."""
    match = _ATTEMPT.search(name)
    return int(match.group(1)) if match else 1


def digest_of(content: bytes) -> str:
    """What events say of a file, to find it changed."""
    return hashlib.sha256(content).hexdigest()


def digest_of_file(storage: Storage, file: str) -> dict[str, str]:
    """A file of the store with its digest, as it is there."""
    return {file: digest_of(storage.read(file))}


def checked_digest(storage: Storage, file: str, digests: Mapping[str, str] | None) -> bytes:
    """What is in the file. Raises StoreError if that is not what `digests` has under its name; runs that were begun
    before events had digests have none."""
    content = storage.read(file)
    wanted = (digests or {}).get(file)
    if wanted is not None and digest_of(content) != wanted:
        raise StoreError(
            f"{file} in {storage.uri} is damaged or was replaced: its sha256 is {digest_of(content)[:12]}, the journal "
            f"says {wanted[:12]} ({len(content)} bytes are there); restore it from a copy, or start the run under "
            "another name"
        )
    return content


def unpruned_file() -> str:
    """The file of `UNPRUNED`."""
    return checkpoint_file(UNPRUNED)


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


def checkpoint_file(name: str) -> str:
    """The file of a checkpoint in the run's folder."""
    return f"{_FOLDER}/{name}{_SUFFIX}"
