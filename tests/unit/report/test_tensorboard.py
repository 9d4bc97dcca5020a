"""Event files arrive in the run's folder and can be read back; a resumed run adds to them."""

import time
from contextlib import closing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laasp_ray.errors import StoreError
from laasp_ray.report.tensorboard import ScalarWriter
from laasp_ray.store.storage import Storage


def scalars(folder, tag):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_scalars_are_there_after_each_sync_and_older_files_stay_as_they_are(tmp_path):
    storage = Storage.open(str(tmp_path))
    with closing(ScalarWriter(storage)) as events:
        events.scalar("train/loss", 2.0, 1)
        assert storage.list() == []
        events.sync()
        assert scalars(tmp_path / "tensorboard", "train/loss") == [(1, 2.0)]
        before = {path: path.read_bytes() for path in (tmp_path / "tensorboard").iterdir()}
        events.sync()
        events.scalar("train/loss", 1.5, 2)
        events.scalar("prune/flops_reduction", 0.25, 1)
    with closing(ScalarWriter(storage)) as resumed:
        resumed.scalar("train/loss", 1.25, 3)
    assert len(storage.list("tensorboard/events.out.tfevents.")) == 3
    assert all(path.read_bytes() == content for path, content in before.items())
    found = [point for path in sorted((tmp_path / "tensorboard").iterdir()) for point in scalars(path, "train/loss")]
    assert sorted(found) == [(1, 2.0), (2, 1.5), (3, 1.25)]


def test_object_storage_gets_them_too():
    storage = Storage.open("mock:///bucket/run")
    with closing(ScalarWriter(storage)) as events:
        events.scalar("test/top1", 0.5, 4)
    (name,) = storage.list()
    assert name.startswith("tensorboard/events.out.tfevents.") and len(storage.read(name)) > 100


def test_now_and_then_is_not_each_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    storage = Storage.open(str(tmp_path))
    with closing(ScalarWriter(storage)) as events:
        for at, files in ((100.0, 0), (399.0, 0), (400.0, 1), (699.0, 1), (700.0, 2)):
            now[0] = at
            events.scalar("test/top1", 0.5, 4)
            events.sync(at_most_every=300)
            assert len(list(storage.list())) == files, at


def test_the_local_folder_is_removed_even_when_the_store_fails(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    events = ScalarWriter(Storage.open(str(tmp_path)))
    events.scalar("test/top1", 0.5, 4)
    scratch = Path(events._scratch.name)
    assert scratch.is_dir()
    with pytest.raises(StoreError, match=r"cannot write events\.out"):
        events.close()
    assert not scratch.exists()
