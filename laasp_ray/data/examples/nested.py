"""Batches of any structure: tensors inside tuples, lists and mappings."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `change` applied to every tensor in it. Other leaves stay as they are."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        items = {key: map_tensors(item, change) for key, item in value.items()}
        return items if type(value) is dict else _rebuilt(value, items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def on_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor on `device`."""
    return map_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))


def in_float32(value: Any) -> Any:
    """`value` with every floating-point tensor in float32."""
    return map_tensors(value, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def digest_of(value: Any) -> str:
    """The sha256 of the values of any structure: equal digests mean equal values, types and shapes."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(f"array {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)}\n".encode())
        for key, item in value.items():
            digest.update(f"{key!r}\n".encode())
            _update(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"sequence {len(value)}\n".encode())
        for item in value:
            _update(digest, item)
    elif value is None or isinstance(value, (str, bytes, bool, int, float, complex)):
        digest.update(f"{type(value).__name__} {value!r}\n".encode())
    elif callable(getattr(value, "tobytes", None)):  # a Pillow image
        digest.update(f"{type(value).__name__} {getattr(value, 'size', '')}\n".encode())
        digest.update(value.tobytes())
    elif getattr(value, "__dict__", None):  # pickled, an object of the user's script would refer to the script
        digest.update(f"{type(value).__qualname__} ".encode())
        _update(digest, vars(value))
    else:
        digest.update(pickle.dumps(value, protocol=4))


def _rebuilt(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    try:
        return type(value)(items)  # type: ignore[call-arg]
    except TypeError:
        return items
