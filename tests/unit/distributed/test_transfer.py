"""Values as arrays and back: every kind of tensor, beside what is no tensor."""

import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from laasp_ray.criteria.pls import Moments
from laasp_ray.distributed.transfer import pack_object, unpack_object


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T,
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.randn(3, requires_grad=True),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_any_tensor_comes_back_as_it_was(tensor):
    found = unpack_object(pack_object({"a": [tensor, "text"]}))
    assert found["a"][1] == "text" and not found["a"][0].requires_grad
    assert found["a"][0].dtype == tensor.dtype and torch.equal(found["a"][0], tensor)


def test_tensors_and_arrays_are_not_copied_into_the_pickle_nor_out_of_the_arrays():
    table = torch.randn(300, 300, dtype=torch.float64)
    state = Moments(torch.zeros(300), torch.zeros(2), torch.zeros(2, 300), table)
    head, *others = pack_object((state, np.ones(5000)))
    assert len(head) < 2000 and sorted(len(other) for other in others)[-2:] == [40_000, 720_000]
    found, ones = unpack_object([head, *others])
    assert torch.equal(found.products, table) and ones.tolist() == [1.0] * 5000
    assert found.products.data_ptr() in {other.ctypes.data for other in others}
    others[0].flags.writeable = False
    assert torch.equal(unpack_object([head, *others])[0].pilot, state.pilot)


def test_what_cannot_be_pickled_is_an_error():
    with pytest.raises((pickle.PicklingError, TypeError), match="lock"):
        pack_object({"a": threading.Lock()})


SCRIPT = """
import pickle, sys
from typing import NamedTuple
import torch
from laasp_ray.distributed.transfer import pack_object

class Item(NamedTuple):
    picture: torch.Tensor
    double: object

item = Item(torch.arange(3.0), lambda value: 2 * value)
sys.stdout.buffer.write(pickle.dumps([array.tobytes() for array in pack_object([item])]))
"""


def test_types_and_functions_of_a_script_come_by_value():
    """Another process reads what the script has packed, as a Ray worker does."""
    paths = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    packed = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, check=True, env={**os.environ, "PYTHONPATH": paths}
    ).stdout
    (item,) = unpack_object([np.frombuffer(part, np.uint8) for part in pickle.loads(packed)])
    assert item._fields == ("picture", "double") and type(item).__module__ == "__main__"
    assert item.picture.tolist() == [0.0, 1.0, 2.0] and item.double(4) == 8
