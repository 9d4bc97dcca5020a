"""A run that is resumed on images, or with settings, that are not those it began with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fakes import Silent
from helpers import write_pictures
from whole_runs import events_of, on_pictures, power_cut

from laasp_ray import api, prune
from laasp_ray.errors import ConfigError, DataError, StoreError
from laasp_ray.run.preflight import open_run
from laasp_ray.store import ownership
from laasp_ray.store.journal import Journal, started_config
from laasp_ray.store.storage import Storage

BROKEN = "train/a/003.png"


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures", side=8, train=24, test=6)


def tiny(storage, pictures, **changes):
    settings = {"train__prune_epoch": 1, "train__epochs": 2, "prune__flops_reduction": 0.02, **changes}
    return on_pictures(storage, pictures, **settings)


def run(config):
    return prune(config, distributed=False, progress=Silent())


@pytest.mark.parametrize("position", [3, 5])  # after the first training phase; after the first iteration
def test_an_image_left_out_and_then_removed_changes_nothing(tmp_path, pictures, monkeypatch, position):
    (pictures / BROKEN).write_bytes(b"no image")
    copy = Path(shutil.copytree(pictures, tmp_path / "copy"))
    reference, config = tiny(tmp_path / "reference", copy), tiny(tmp_path / "runs", pictures)
    expected = run(reference)
    assert [event.data["index"] for event in events_of(reference) if event.name == "excluded"] == [1]
    with power_cut(monkeypatch, position):
        run(config)
    (pictures / BROKEN).unlink()
    result = run(config)
    assert [event.name for event in events_of(config)] == [event.name for event in events_of(reference)]
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (
            "train/b/001.png",
            r"training images are not .*23 now, 24 at its start\): the class b has 7 images instead of 8",
        ),
        ("val/b/001.png", r"test images are not .*5 now, 6 at its start\): the class b has 1 images instead of 2"),
    ],
)
def test_a_run_does_not_go_on_with_other_images(tmp_path, pictures, monkeypatch, gone, said):
    config = tiny(tmp_path / "runs", pictures)
    with power_cut(monkeypatch, 2):
        run(config)
    (pictures / gone).rename(tmp_path / "aside.png")
    with pytest.raises(DataError, match=said):
        run(config)
    assert len(events_of(config)) == 2
    (tmp_path / "aside.png").rename(pictures / gone)
    run(config)


def test_a_lost_config_does_not_admit_another(tmp_path, pictures, monkeypatch, caplog):
    config = tiny(tmp_path / "runs", pictures)
    with power_cut(monkeypatch, 2):
        run(config)
    file = tmp_path / "runs" / "small" / "config.json"
    theirs = tiny(tmp_path / "runs", pictures, prune__step=0.04)
    for content in (None, json.dumps(theirs.to_dict()), "{", "[]"):
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(ConfigError, match=r"prune\.step: 0\.03 there, 0\.04 here\)"):
            run(theirs)
    with power_cut(monkeypatch, 3):
        run(config)
    assert json.loads(file.read_text()) == config.to_dict()
    assert "config.json is not what the run was started with: it is written anew" in caplog.text


def test_of_two_drivers_at_once_the_second_is_refused_and_leaves_nothing(tmp_path, pictures, monkeypatch):
    first, second = (tiny(tmp_path / "runs", pictures, seed=seed) for seed in (1, 0))
    begin = api.start_run
    monkeypatch.setattr(ownership, "BEAT_S", 1.0)
    refused = []

    def late(*given):
        if not refused:
            refused.append(True)
            with pytest.raises(StoreError, match=r"another driver has the run in .* and it lives: stop that one first"):
                run(second)
        begin(*given)

    with monkeypatch.context() as patch:
        patch.setattr(api, "start_run", late)
        result = run(first).model.state_dict()
    folder = tmp_path / "runs" / "small"
    start = events_of(first)[0]
    assert start.data["config"]["seed"] == json.loads((folder / "config.json").read_text())["seed"] == 1
    alone = run(tiny(tmp_path / "alone", pictures, seed=1)).model.state_dict()
    assert all(torch.equal(tensor, result[name]) for name, tensor in alone.items())


def test_settings_that_are_none_are_named_as_long_as_there_is_no_journal(tmp_path, pictures):
    config = tiny(tmp_path, pictures)
    storage = Storage.open(config.storage).child(config.name)
    storage.write("config.json", b"null")
    with pytest.raises(StoreError, match=r"config\.json in .* is damaged: it holds null, .*give another --name"):
        open_run(config)


def test_a_first_event_without_settings_is_named(tmp_path, pictures):
    config = tiny(tmp_path, pictures)
    storage = Storage.open(config.storage).child(config.name)
    assert started_config(storage) is None
    Journal(storage).append("start", {"checkpoint": "initial"})
    with pytest.raises(StoreError, match=r"000001-start\.json in .* has no config"):
        open_run(config)
