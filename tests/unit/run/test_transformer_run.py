"""A whole run of a vision transformer of timm's, by name: heads, hidden layers and the embedding are pruned."""

import dataclasses
import json

import pytest
import torch
from helpers import small_run, write_pictures

from laasp_ray import load_pruned, prune
from laasp_ray.models import build
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

TINY = {
    "num_classes": 3,
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 1,
    "num_heads": 4,
    "mlp_ratio": 2,
}


def test_a_vision_transformer_is_pruned_and_loaded(tmp_path):
    pytest.importorskip("timm")
    pictures = write_pictures(tmp_path / "pictures", side=16, train=24, test=6)
    config = small_run(
        tmp_path,
        data__path=str(pictures),
        data__format="folder",
        model__builder="timm.vit_tiny_patch16_224",
        model__arguments=TINY,
        prune__extra_layers=["blocks.*"],
        prune__ignored=["patch_embed"],
        prune__flops_reduction=0.2,
        prune__step=0.05,
        prune__fine_tune_every=0.5,
        train__prune_epoch=0,
        train__epochs=1,
        train__batch_size=12,
    )
    found = prune(config, distributed=False)
    storage = Storage.open(config.storage).child(config.name)
    events = [event.data for event in Journal(storage).events() if event.name == "iteration"]
    layers = {event["decision"]["layer"].partition("blocks.0.")[2] for event in events}
    assert layers <= {"attn.qkv", "mlp.fc1"} and layers
    kept, plan = events[-1]["kept_filters"], json.loads((tmp_path / "small" / "pruned" / "plan.json").read_text())
    heads = kept.get("blocks.0.attn.qkv", 4)
    attributes = (plan.get("attributes") or plan["plan"]["attributes"]).get("blocks.0.attn", {"num_heads": 4})
    assert heads == attributes["num_heads"] <= 4
    loaded = load_pruned(found.folder)
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(loaded(images), found.model.eval()(images))
    assert loaded.blocks[0].attn.num_heads == heads and loaded.blocks[0].mlp.fc1.out_features == kept.get(
        "blocks.0.mlp.fc1", 16
    )
    # The same network again: the run is finished, and its own network comes back.
    again = prune(dataclasses.replace(config), model=build(config.model), distributed=False)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in again.model.state_dict().items())
