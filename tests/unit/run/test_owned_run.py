"""Whole runs and what they stand on: digests, attempts, a full disk, a store that fails TensorBoard."""

import json
import os
import subprocess

import pytest
import torch
from fakes import Silent
from helpers import write_pictures
from whole_runs import events_of, on_pictures, power_cut

from laasp_ray import prune
from laasp_ray.errors import StoreError
from laasp_ray.store.checkpoint import digest_of
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images"), side=8, train=12, test=6)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, pictures):
    """A run on them that nothing happens to: its result and the names of its events."""
    config = on_pictures(tmp_path_factory.mktemp("undisturbed"), pictures)
    result = run(config)
    return result, [event.name for event in events_of(config)]


def run(config):
    return prune(config, distributed=False, progress=Silent())


def cut_after_an_epoch(config, monkeypatch):
    with power_cut(monkeypatch, 2):
        run(config)
    return Storage.open(config.storage).child(config.name)


def test_events_tell_the_digests_and_a_checkpoint_that_changed_is_named(tmp_path, pictures, monkeypatch):
    config = on_pictures(tmp_path, pictures)
    storage = cut_after_an_epoch(config, monkeypatch)
    event = events_of(config)[-1]
    (file,) = event.data["digests"]
    assert event.name == "epoch" and event.attempt == 1 and file == "checkpoints/000000.safetensors"
    whole = storage.read(file)
    for damaged in (whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1])):
        storage.write(file, damaged)
        with pytest.raises(StoreError, match=rf"{file} in .* is damaged or was replaced: .*; restore it from a copy"):
            run(config)
    storage.delete(file)
    with pytest.raises(StoreError, match=rf"cannot read {file} .*does not exist"):
        run(config)
    storage.write(file, whole)
    run(config)
    attempts = [event.attempt for event in events_of(config)]
    assert attempts[:2] == [1, 1] and attempts == sorted(attempts) and attempts[-1] > 1
    names = {name for event in events_of(config) for name in event.data.get("digests", {})}
    assert any(name.endswith(f"-a{attempts[-1]}.safetensors") for name in names)
    assert {"checkpoints/unpruned.safetensors", "candidates/000001.parquet"} <= names
    assert len(storage.list("checkpoints/")) == 3  # the last two, and the unpruned network


def test_a_run_of_before_digests_and_attempts_goes_on(tmp_path, pictures, monkeypatch):
    config = on_pictures(tmp_path, pictures)
    storage = cut_after_an_epoch(config, monkeypatch)
    for name in storage.list("journal/"):
        content = json.loads(storage.read(name))
        del content["attempt"], content["data"]["digests"]
        storage.write(name, json.dumps(content).encode())
    for name in storage.list("owner/"):
        storage.delete(name)
    run(config)
    assert events_of(config)[-1].name == "finish"


def test_a_last_event_that_was_cut_off_is_done_again(tmp_path, pictures, undisturbed, monkeypatch):
    result, names = undisturbed
    config = on_pictures(tmp_path / "cut", pictures)
    storage = Storage.open(config.storage).child(config.name)
    epochs = [position for position, name in enumerate(names) if name == "epoch"]
    for torn in (epochs[0], names.index("iteration"), epochs[-1]):
        with power_cut(monkeypatch, torn + 1):
            run(config)
        storage.write(storage.list("journal/")[-1], b"")
    again = run(config)
    assert [event.name for event in events_of(config)] == names
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_without_the_events_since_a_lost_checkpoint_a_run_goes_on_from_the_epoch_before(
    tmp_path, pictures, undisturbed, monkeypatch
):
    result, names = undisturbed
    config = on_pictures(tmp_path / "lost", pictures)
    with power_cut(monkeypatch, names.index("iteration") + 1):
        run(config)
    storage = Storage.open(config.storage).child(config.name)
    epoch = next(event for event in reversed(events_of(config)) if event.name == "epoch")
    storage.delete(f"checkpoints/{epoch.data['checkpoint']}.safetensors")
    for file in storage.list("journal/")[epoch.sequence - 1 :]:
        storage.delete(file)
    again = run(config)
    assert [event.name for event in events_of(config)] == names
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_an_unpruned_network_damaged_before_the_first_iteration_is_stored_again(
    tmp_path, pictures, undisturbed, monkeypatch
):
    config, file = on_pictures(tmp_path, pictures), "checkpoints/unpruned.safetensors"
    storage = Storage.open(config.storage).child(config.name)
    _, names = undisturbed
    with power_cut(monkeypatch, names.index("iteration")):
        run(config)
    whole = storage.read(file)
    storage.write(file, whole[:-1] + bytes([whole[-1] ^ 1]))
    run(config)
    assert storage.read(file) == whole
    (first, *_) = [event for event in events_of(config) if event.name == "iteration"]
    assert first.data["digests"][file] == digest_of(whole)


def test_tensorboard_never_ends_a_run(tmp_path, pictures, caplog):
    config = on_pictures(tmp_path, pictures)
    folder = tmp_path / config.name
    folder.mkdir()
    (folder / "tensorboard").write_text("in the way")
    run(config)
    assert events_of(config)[-1].name == "finish" and "TensorBoard's files could not be written" in caplog.text


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_full_ends_a_run_that_goes_on_after_room_is_made(small_disk, pictures):
    config = on_pictures(small_disk, pictures)
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(b"0" * (free - 1_800_000))  # room for the first weights, not for all that follows
    with pytest.raises(StoreError, match=r"cannot write .*: it is full .*make room there, then the same command goes"):
        run(config)
    done = len(events_of(config))
    assert not [name for name in os.listdir(small_disk / config.name / "checkpoints") if name.endswith(".tmp")]
    ballast.unlink()
    run(config)
    assert done >= 1 and Journal(Storage.open(config.storage).child(config.name)).events()[-1].name == "finish"
