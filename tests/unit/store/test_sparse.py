"""Networks of group sparsity on disk: only what is kept and where, and back bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from laasp_ray import models
from laasp_ray.config import ModelConfig
from laasp_ray.errors import ArtifactError, StoreError
from laasp_ray.pruning.plan import Plan
from laasp_ray.pruning.sparsity.groups import GroupRule, group_mask, pack_mask
from laasp_ray.store.artifact import load_pruned, read_arch, save_pruned
from laasp_ray.store.sparse import compact, expand, load_masks, save_masks
from laasp_ray.store.storage import Storage

CIFAR = ModelConfig(builder="cifar.resnet20", input_shape=(3, 32, 32))


def sparse_network(dtype=torch.float32):
    """A ResNet-20 of which every convolution but the first keeps 2 of 8 weights, and its masks."""
    torch.manual_seed(0)
    model = models.build(CIFAR).to(dtype)
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name != "conv1":
            mask = group_mask(module.weight, GroupRule(8, 6))
            module.weight.data.masked_fill_(~mask, 0)
            masks[f"{name}.weight"] = pack_mask(mask)
    return model.eval(), masks


def save(folder, model, masks):
    return save_pruned(
        Storage.open(str(folder)), model=model, model_config=CIFAR, plan=Plan.empty(), metrics={}, masks=masks
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sparse_network_comes_back_bit_for_bit(tmp_path, dtype):
    model, masks = sparse_network(dtype)
    save(tmp_path, model, masks)
    loaded = load_pruned(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]) and tensor.dtype == loaded.state_dict()[name].dtype
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        assert torch.equal(model(images), loaded(images))
    assert set(read_arch(tmp_path).sparse) == set(masks)


def test_only_what_is_kept_is_written_with_a_bit_a_weight_for_its_place(tmp_path):
    model, masks = sparse_network()
    written = save(tmp_path / "sparse", model, masks)
    dense = save(tmp_path / "dense", model, {})
    assert written == (tmp_path / "sparse" / "model.safetensors").stat().st_size
    assert dense == (tmp_path / "dense" / "model.safetensors").stat().st_size
    # The sparse convolutions have 269,824 weights: of their bytes a quarter stays, and an eighth of a byte a weight.
    weights = sum(model.get_parameter(name).numel() for name in masks)
    assert weights == 269_824
    saved = weights * 4 - weights - weights // 8
    # The names of the places in the head of the file cost some of it.
    assert saved - 5000 < dense - written <= saved


def test_compact_by_hand():
    mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    tensors = {"a": torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 3.0, 4.0, 0.0]]), "b": torch.tensor([5.0])}
    small = compact(tensors, {"a": pack_mask(mask)})
    assert small["a"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert small["places/a"].tolist() == [0b10010110]
    assert small["b"].tolist() == [5.0]
    back = expand(small, {"a": (2, 4), "b": (1,)}, ("a",))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_a_weight_of_zero_that_is_kept_has_a_place_too():
    small = compact({"a": torch.tensor([[0.0, 0.0]])}, {"a": pack_mask(torch.tensor([[False, True]]))})
    assert small["a"].tolist() == [0.0]


def test_masks_that_do_not_fit_are_refused():
    packed = pack_mask(torch.tensor([[True, False]]))
    with pytest.raises(ArtifactError, match="a is not zero where its mask prunes it"):
        compact({"a": torch.tensor([[1.0, 2.0]])}, {"a": packed})
    with pytest.raises(ArtifactError, match="a mask for b"):
        compact({"a": torch.tensor([[1.0, 0.0]])}, {"b": packed})
    with pytest.raises(ArtifactError, match=r"a: a mask of 1 bytes does not belong to a weight of shape \(3, 3\)"):
        compact({"a": torch.zeros(3, 3)}, {"a": packed})


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NAME = "layer1.0.conv1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"places/{NAME}"), "lacks its values, its places or its shape"),
        (lambda tensors: tensors.update({NAME: tensors[NAME][1:].clone()}), "has 575 values for 576 places"),
        (lambda tensors: tensors.update({f"places/{NAME}": torch.zeros(3, dtype=torch.uint8)}), "a mask of 3 bytes"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, message):
    save(tmp_path, *sparse_network())
    damage(tmp_path, change)
    with pytest.raises(ArtifactError, match=rf"model\.safetensors in .* is damaged: .*{message}"):
        load_pruned(tmp_path)


def test_artifacts_from_before_there_was_sparsity_are_read(tmp_path):
    model, _ = sparse_network()
    save(tmp_path, model, {})
    arch = json.loads((tmp_path / "arch.json").read_text())
    del arch["sparse"]
    (tmp_path / "arch.json").write_text(json.dumps(arch))
    assert torch.equal(load_pruned(tmp_path).conv1.weight, model.conv1.weight)


def test_the_masks_of_a_stage_are_kept(tmp_path):
    storage = Storage.open(str(tmp_path))
    save_masks(storage, 2, {"a": b"\x01\xff", "b": b"\x00"})
    assert load_masks(storage, 2) == {"a": b"\x01\xff", "b": b"\x00"}
    with pytest.raises(StoreError):
        load_masks(storage, 1)
