"""Converts tensors to numpy arrays, which all processes of a node can read from Ray's object store without a copy."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ray import cloudpickle

from laasp_ray.errors import ConfigError


def pack(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def unpack(arrays: Mapping[str, np.ndarray], *, copy: bool) -> dict[str, torch.Tensor]:
    """The inverse of `pack`. With `copy` False the tensors are views of the object store and must not be written to."""
    if copy:
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    return {name: _view(np.asarray(array)) for name, array in arrays.items()}


def pack_object(value: Any) -> list[np.ndarray]:
    """Converts any value that Ray can send to byte arrays: its pickle, then each tensor and array in it separately.

    Types and functions of the user's script, which a worker cannot import, are in the pickle by value.
    """
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    return [np.frombuffer(file.getvalue(), np.uint8), *(np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers)]


def unpack_object(arrays: Sequence[np.ndarray]) -> Any:
    """The inverse of `pack_object`. Tensors are on the CPU and are views of the object store, as in `unpack` without
    `copy`.
    """
    head, *buffers = arrays
    return pickle.loads(head.tobytes(), buffers=buffers)


def check_portable(parts: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming the part, if one of `parts` cannot be pickled to be sent to workers."""
    for name, part in parts.items():
        try:
            cloudpickle.loads(cloudpickle.dumps(part))
        except Exception as error:  # a user's object can raise any error
            raise ConfigError(
                f"{name} cannot be sent to workers ({type(error).__name__}: {error}): it must be picklable; "
                "open files, sockets and locks inside the factory, which runs in every worker, not around it"
            ) from error


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # Ray's copy has no types
    """Pickles a tensor as a separate buffer of bytes, and all else as Ray does."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return super().reducer_override(value)
        tensor = value.detach().cpu().contiguous()
        return _tensor_of, (tensor.reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tensor.shape)


def _tensor_of(array: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return _view(array).view(dtype).reshape(shape)


def _view(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
