"""One iteration of each phase of every recipe of group sparsity on tiny real input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import write_digits
from tiny_recipes import run_here, tiny
from torch import nn

from laasp_ray import load_pruned
from laasp_ray.pruning.sparsity.groups import group_counts, unpack_mask
from laasp_ray.recipes import group_sparsity, recipe
from laasp_ray.store.sparse import load_masks
from laasp_ray.store.storage import Storage

# The smallest images that they take, up to a multiple of 16; of the grouped AlexNet's linear layers it is their own.
SIDES = {"alexnet_grouped_aap": 224, "alexnet_aap": 64}
NAMES = [recipe.__name__ for recipe in group_sparsity.RECIPES]
HEAVY = set(NAMES) - {"squeezenet1_0_aap", "mobilenet_v1_aap"}
"""They have 23 to 134 million weights, of which every phase writes a checkpoint."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("pictures"), side=32, train=6, test=3)


@pytest.fixture
def storage(tmp_path):
    """Removed after the test: pytest would keep gigabytes of checkpoints."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def layers_of(model):
    """The weight of every convolution and linear layer, and whether the recipe makes it sparse."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # 16 inputs a filter have neither the first convolution nor the depthwise ones.
            yield name, module.weight.detach(), isinstance(module, nn.Conv2d) and module.weight.shape[1] >= 16


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.exhaustive) if name in HEAVY else name for name in NAMES],
)
def test_one_iteration_of_each_phase(name, pictures, storage):
    config = tiny(recipe(name), pictures, storage, side=SIDES.get(name, 32))
    assert (config.prune.group, config.prune.pruned_per_group, config.prune.stages) == (16, 12, (6, 12))
    result, events = run_here(config)
    assert [event.name for event in events] == (
        [
            "start",
            "epoch",
            "training_phase",
            "iteration",
            "epoch",
            "training_phase",
            "iteration",
            "epoch",
            "training_phase",
            "finish",
        ]
    )
    assert [event.data["phase"] for event in events if event.name == "epoch"] == ["train", "fine-tune", "final"]
    layers = list(layers_of(result.model))
    sparse = {layer: weight for layer, weight, is_sparse in layers if is_sparse}
    assert 1 < len(sparse) < len(layers)
    assert [event.data["details"]["prune"] for event in events if event.name == "iteration"] == (
        [dict.fromkeys(sparse, 6), dict.fromkeys(sparse, 12)]
    )
    masks = load_masks(Storage.open(result.folder), 2)
    assert masks.keys() == {f"{layer}.weight" for layer in sparse}
    for layer, weight in sparse.items():
        assert weight.shape[1] % 16 == 0 and (group_counts(weight != 0, 16) == 16 - 12).all(), layer
        assert torch.equal(unpack_mask(masks[f"{layer}.weight"], weight.shape), weight != 0), layer
    images = torch.randn(2, *config.model.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(load_pruned(result.folder)(images), result.model(images))
    check_report(Path(result.folder), layers)
    assert result.summary["metrics"]["images"] == 3
    assert result.summary["weights_bytes"] < result.summary["weights_bytes_dense"]


def check_report(folder, layers):
    rows = {row["layer"]: row for row in json.loads((folder / "sparsity.json").read_text())["layers"]}
    assert list(rows) == [layer for layer, _, _ in layers]
    for layer, weight, is_sparse in layers:
        row = rows[layer]
        kept = weight.numel() // 4 if is_sparse else weight.numel()
        assert (row["weights"], row["kept"], row["density"]) == (weight.numel(), kept, kept / weight.numel())
        if is_sparse:
            # Every group has as many weights as there are multipliers.
            assert (row["group"], row["prune"], row["utilisation"], row["reason"]) == (16, 12, 1, "")
            assert 0.2 < row["utilisation_unstructured"] < 1
        else:
            assert row["utilisation"] is None and row["reason"]
