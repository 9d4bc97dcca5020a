"""Checkpoints: every kind of tensor comes back as it was."""

import numpy as np
import pytest
import torch

from laasp_ray.errors import StoreError
from laasp_ray.store.checkpoint import delete_checkpoints, load_checkpoint, save_checkpoint
from laasp_ray.store.storage import Storage


@pytest.fixture(params=["local", "arrow"])
def storage(request, tmp_path):
    return Storage.open(str(tmp_path) if request.param == "local" else "mock:///bucket/run")


def test_tensors_of_every_kind_come_back(storage):
    base = torch.arange(12.0).reshape(3, 4)
    model = {
        "transposed": base.t(),
        "columns": base[:, 1:3],
        "tied": base,
        "tied.again": base,
        "half": base.bfloat16(),
        "bn.num_batches_tracked": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    optimizer_state = {"momentum": np.array([[1.5, 2.5]], dtype=np.float32)[:, ::-1], "steps": np.int64(3)}
    save_checkpoint(storage, "000007", model=model, optimizer_state=optimizer_state, metadata={"epoch": "7"})
    assert storage.list() == ["checkpoints/000007.safetensors"]
    checkpoint = load_checkpoint(storage, "000007")
    assert list(checkpoint.model.keys() ^ model.keys()) == []
    for name, tensor in model.items():
        assert checkpoint.model[name].dtype == tensor.dtype and checkpoint.model[name].shape == tensor.shape
        assert torch.equal(checkpoint.model[name], tensor), name
    assert checkpoint.optimizer_state["momentum"].tolist() == [[2.5, 1.5]]
    assert checkpoint.optimizer_state["steps"].shape == () and checkpoint.optimizer_state["steps"].dtype == torch.int64
    assert checkpoint.metadata == {"epoch": "7"}


def test_tied_tensors_come_back_untied_and_the_saved_ones_are_untouched(storage):
    shared = torch.zeros(2)
    save_checkpoint(storage, "a", model={"x": shared, "y": shared})
    loaded = load_checkpoint(storage, "a").model
    loaded["x"] += 1
    assert loaded["y"].tolist() == [0, 0] and shared.tolist() == [0, 0]


def test_read_only_arrays_are_taken(storage):
    array = np.ones(3, dtype=np.float32)
    array.flags.writeable = False
    save_checkpoint(storage, "a", model={"x": array})
    assert load_checkpoint(storage, "a").model["x"].tolist() == [1, 1, 1]


def test_what_is_no_tensor_is_refused(storage):
    with pytest.raises(TypeError, match=r"model/x is a list"):
        save_checkpoint(storage, "a", model={"x": [1]})
    assert storage.list() == []


def test_damaged_and_foreign_files_are_named(storage):
    from safetensors.torch import save

    save_checkpoint(storage, "a", model={"x": torch.zeros(1000)})
    whole = storage.read("checkpoints/a.safetensors")
    for damaged in (whole[:-1], whole[:20], b"", b"\xff" * 64):
        storage.write("checkpoints/a.safetensors", damaged)
        with pytest.raises(StoreError, match=r"checkpoints/a.safetensors in .* is no whole safetensors file"):
            load_checkpoint(storage, "a")
    storage.write("checkpoints/a.safetensors", save({"conv.weight": torch.zeros(1)}))
    with pytest.raises(StoreError, match=r"its key 'conv.weight' starts with neither 'model/' nor 'optimizer_state/'"):
        load_checkpoint(storage, "a")
    with pytest.raises(StoreError, match=r"cannot read checkpoints/b.safetensors"):
        load_checkpoint(storage, "b")


def test_only_the_kept_checkpoints_stay(storage):
    for name in ("000001", "000002", "unpruned"):
        save_checkpoint(storage, name, model={"x": torch.zeros(1)})
    storage.write("journal/000001-start.json", b"{}")
    delete_checkpoints(storage, keep=["unpruned", "000002"])
    assert storage.list() == [
        "checkpoints/000002.safetensors",
        "checkpoints/unpruned.safetensors",
        "journal/000001-start.json",
    ]
    delete_checkpoints(storage.child("nothing-yet"), keep=[])


def test_what_is_from_before_a_number_stays(storage):
    for name in ("initial-1a2b3c4d", "unpruned", "000003", "000004-a2", "000005-a2", "000006-a3"):
        save_checkpoint(storage, name, model={"w": torch.zeros(1)})
    delete_checkpoints(storage, keep=["000006-a3"], attempt=3, since=4)
    left = [file.removeprefix("checkpoints/").removesuffix(".safetensors") for file in storage.list("checkpoints/")]
    assert left == ["000003", "000006-a3", "initial-1a2b3c4d", "unpruned"]
