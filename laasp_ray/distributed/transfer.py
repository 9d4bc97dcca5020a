"""State dicts as numpy arrays, which Ray's object store hands to every process of a node without copying them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch


def pack(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def unpack(arrays: Mapping[str, np.ndarray], *, copy: bool) -> dict[str, torch.Tensor]:
    """With `copy` False the tensors are views of the object store: whoever writes to one corrupts it for everyone."""
    if copy:
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
