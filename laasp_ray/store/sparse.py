"""Masked weights on disk: only the values that are kept are stored, with one bit per weight for their positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from laasp_ray.errors import ArtifactError, PruningError
from laasp_ray.pruning.sparsity.groups import unpack_mask
from laasp_ray.store.checkpoint import checked_digest, digest_of, numbered_name, pack_tensors, unpack_tensors
from laasp_ray.store.storage import Storage

_PLACES, _MASKS = "places/", "masks/"


def save_masks(storage: Storage, stage: int, masks: Mapping[str, bytes], attempt: int = 1) -> dict[str, str]:
    """Writes a stage's packed masks as `masks/NNNNNN.safetensors`, and gives the file with its digest. A stage that is
    made anew replaces its file, that of a later attempt has a name of its own."""
    packed = pack_tensors({name: _as_tensor(mask) for name, mask in masks.items()}, {})
    file = _masks_file(stage, attempt)
    storage.write(file, packed)
    return {file: digest_of(packed)}


def has_masks(storage: Storage, iteration: int) -> bool:
    """Whether an iteration (from 1) stored masks."""
    return iteration > 0 and storage.exists(_masks_file(iteration))


def load_masks(storage: Storage, stage: int, digests: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """The masks of a stage, from the file that `digests`, of its event, names, if it names one. Raises StoreError if
    there are none or their file is damaged."""
    file = masks_file_of(digests or {}) or _masks_file(stage)
    tensors, _ = unpack_tensors(checked_digest(storage, file, digests), f"{file} in {storage.uri}")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def masks_file_of(digests: Mapping[str, str]) -> str | None:
    """The file of masks among those that an event names."""
    return next((file for file in digests if file.startswith(_MASKS)), None)


def compact(state: Mapping[str, torch.Tensor], masks: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """Converts `state` to its stored form: a masked tensor becomes a vector of the kept values, and its positions are
    added.

    Raises ArtifactError if a mask has no tensor in `state`, or prunes a weight that is not zero.
    """
    tensors = dict(state)
    for name, packed in masks.items():
        if name not in state:
            raise ArtifactError(f"there is a mask for {name}, but the network has no such tensor")
        tensor = state[name].detach().cpu()
        kept = _unpack(packed, tensor.shape, name)
        if torch.count_nonzero(tensor[~kept]):
            raise ArtifactError(f"{name} is not zero where its mask prunes it: the mask is not this network's")
        tensors[name], tensors[_PLACES + name] = tensor[kept], _as_tensor(packed)
    return tensors


def expand(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], sparse: Iterable[str]
) -> dict[str, torch.Tensor]:
    """The inverse of `compact`. Restores the tensors named by `sparse` in their `shapes`, with zeros at pruned
    positions.

    Raises ArtifactError, naming the tensor, if values, positions and shape do not fit together.
    """
    state = dict(tensors)
    for name in sparse:
        if name not in state or _PLACES + name not in state or name not in shapes:
            raise ArtifactError(f"the sparse tensor {name} lacks its values, its places or its shape")
        values, places = state[name], state.pop(_PLACES + name)
        kept = _unpack(places.numpy().tobytes(), shapes[name], name)
        if values.shape != (int(kept.sum()),):
            raise ArtifactError(f"the sparse tensor {name} has {values.numel()} values for {int(kept.sum())} places")
        state[name] = torch.zeros(shapes[name], dtype=values.dtype).masked_scatter_(kept, values)
    return state


def _unpack(packed: bytes, shape: tuple[int, ...], name: str) -> torch.Tensor:
    try:
        return unpack_mask(packed, shape)
    except PruningError as error:
        raise ArtifactError(f"{name}: {error}") from error


def _as_tensor(packed: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(packed, np.uint8).copy())


def _masks_file(stage: int, attempt: int = 1) -> str:
    return f"{_MASKS}{numbered_name(stage, attempt)}.safetensors"
