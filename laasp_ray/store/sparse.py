"""Weights with masks on disk: of a masked tensor only the values that are kept, and a bit a weight for their places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from laasp_ray.errors import ArtifactError, PruningError
from laasp_ray.pruning.sparsity.groups import unpack_mask
from laasp_ray.store.checkpoint import pack_tensors, unpack_tensors
from laasp_ray.store.storage import Storage

_PLACES = "places/"


def save_masks(storage: Storage, stage: int, masks: Mapping[str, bytes]) -> None:
    """Writes a stage's packed masks as `masks/NNNNNN.safetensors`; a stage that is made anew replaces its file."""
    storage.write(_masks_file(stage), pack_tensors({name: _as_tensor(mask) for name, mask in masks.items()}, {}))


def has_masks(storage: Storage, iteration: int) -> bool:
    """Whether an iteration (from 1) left masks."""
    return iteration > 0 and storage.exists(_masks_file(iteration))


def load_masks(storage: Storage, stage: int) -> dict[str, bytes]:
    """Raises StoreError if there are none or their file is damaged."""
    file = _masks_file(stage)
    tensors, _ = unpack_tensors(storage.read(file), f"{file} in {storage.uri}")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def compact(state: Mapping[str, torch.Tensor], masks: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """`state` as it is stored: a masked tensor is the vector of what it keeps, its places are beside it.

    Raises ArtifactError if a mask has no tensor of its own in `state`, or leaves out a weight that is not zero.
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
    """The inverse of `compact`: the tensors named by `sparse` in their `shapes`, with zeros between what was kept.

    Raises ArtifactError, naming the tensor, if values, places and shape do not belong together.
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


def _masks_file(stage: int) -> str:
    return f"masks/{stage:06d}.safetensors"
