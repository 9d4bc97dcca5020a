"""Weights as people have them: from other libraries and wrappers, full pickles, and damaged files."""

import random
import re

import pytest
import safetensors.torch
import torch
from torch import nn

from laasp_ray.errors import ConfigError
from laasp_ray.models import load_weights


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def shaken():
    model = network()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) if tensor.is_floating_point() else torch.full(tensor.shape, 7))
    return model


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def same(model, state):
    return all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: prefixed("_orig_mod.", state),
        lambda state: prefixed("module.", state),
        lambda state: prefixed("module._orig_mod.", state),
        lambda state: prefixed("_orig_mod.module.", state),
        lambda state: {"state_dict": prefixed("model.", state), "pytorch-lightning_version": "2"},
        lambda state: {"state_dict": prefixed("model._orig_mod.", state)},
        lambda state: {"model_state": state},
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {"ema": state},
        lambda state: {"model": state, "ema": prefixed("x.", state)},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.", state)},
    ],
)
def test_what_wrappers_put_around_the_weights(tmp_path, wrap):
    state, target = shaken().state_dict(), network()
    torch.save(wrap(state), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert same(target, state)


def test_a_prefix_that_the_network_has_itself_stays(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 2)

    source, target = Net(), Net()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert same(target, source.state_dict())
    torch.save({**prefixed("module.", source.state_dict()), "odd": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"2 missing .*3 unexpected \(module\.model\.bias, "):
        load_weights(target, tmp_path / "w.pth")  # not all keys have it: nothing is guessed


def test_batchnorms_counts_may_be_missing_and_nothing_else(tmp_path):
    state = shaken().state_dict()
    target = shaken()
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert same(target, state) and target[1].num_batches_tracked == 0
    del state["1.running_mean"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"2 missing \(1\.num_batches_tracked, 1\.running_mean\)"):
        load_weights(target, tmp_path / "w.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_whole_pickled_network_is_refused_in_our_words(tmp_path, legacy):
    torch.save(network(), tmp_path / "net.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConfigError) as caught:
        load_weights(network(), tmp_path / "net.pth")
    message = str(caught.value)
    assert re.search(r"net\.pth holds more than tensors, and reading it would run code \(it names torch\.nn\.", message)
    assert "torch.save(model.state_dict(), FILE)" in message and "safetensors" in message
    assert "weights_only" not in message and "safe_globals" not in message and caught.value.__suppress_context__


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_refused_in_our_words(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(ConfigError, match=r"script\.pt is a TorchScript archive.*torch\.save") as caught:
        load_weights(network(), tmp_path / "script.pt")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [3, None, [], {}, "text", {"state_dict": 3}, {1: torch.ones(1)}, torch.ones(2), {"model": {"a": [1]}}]
)
def test_files_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w\.pth holds no state dict"):
        load_weights(network(), tmp_path / "w.pth")


def damaged(whole, generator):
    """`whole` cut, with bits flipped, with a stretch of other bytes, or something else altogether."""
    kind = generator.randrange(6)
    if kind == 0:
        return whole[: generator.randrange(len(whole))]
    if kind in (1, 2, 3):
        spoilt = bytearray(whole)
        top = len(spoilt) if kind == 1 else min(400, len(spoilt))
        for _ in range(generator.randrange(1, 8)):
            spoilt[generator.randrange(top)] ^= 1 << generator.randrange(8)
        return bytes(spoilt)
    if kind == 4:
        start = generator.randrange(len(whole))
        stretch = generator.randbytes(generator.randrange(1, 300))
        return whole[:start] + stretch + whole[start + len(stretch) :]
    return generator.choice(
        [b"", b"\0", b"PK\3\4junk", b"PK\5\6" + b"\0" * 18, b"{}", generator.randbytes(500), b"\x80\x02." + whole[:50]]
    )


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_by_name_or_read(tmp_path):
    generator, state = random.Random(7), shaken().state_dict()
    torch.save(state, tmp_path / "new.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    refused = 0
    for name in ("new.pth", "old.pth", "w.safetensors"):
        whole = (tmp_path / name).read_bytes()
        path = tmp_path / f"damaged-{name}"
        for _ in range(80):
            path.write_bytes(damaged(whole, generator))
            try:
                load_weights(network(), path)  # a flipped bit of a weight cannot be told
            except ConfigError as error:
                refused += 1
                assert str(path) in str(error) and "weights_only" not in str(error)
    assert refused > 120
