"""Filesystems that cannot do everything, and damaged files of a run: handled, or told by name."""

import errno
import os

import pytest
from fakes import Silent
from helpers import write_pictures
from whole_runs import on_pictures

from laasp_ray import prune
from laasp_ray.errors import ArtifactError, StoreError
from laasp_ray.planning.dry_run import dry_run
from laasp_ray.run.evaluate import evaluate_run
from laasp_ray.run.preflight import open_run
from laasp_ray.store.artifact import load_pruned
from laasp_ray.store.checkpoint import unpack_tensors
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

NO_LINKS = ["EPERM", "ENOTSUP", "EOPNOTSUPP", "EMLINK", "ENOSYS", "EACCES", "EXDEV", "EINVAL", "EIO", "EROFS"]


def refusing(monkeypatch, function, code, only=lambda *_: True):
    real = getattr(os, function)

    def call(*given, **named):
        if only(*given):
            raise OSError(code, os.strerror(code))
        return real(*given, **named)

    monkeypatch.setattr(os, function, call)


@pytest.mark.parametrize("name", NO_LINKS)
def test_a_filesystem_without_hard_links_holds_a_journal(tmp_path, monkeypatch, name):
    refusing(monkeypatch, "link", getattr(errno, name))
    storage = Storage.open(str(tmp_path))
    storage.check_writable()
    Journal(storage).append("start", {})
    with pytest.raises(StoreError, match="exists already"):
        storage.write_new("journal/000001-start.json", b"{}")
    assert storage.list() == ["journal/000001-start.json"]


def test_a_link_that_nfs_made_and_reports_as_there_is_ours(tmp_path, monkeypatch):
    link = os.link

    def twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    storage = Storage.open(str(tmp_path))
    storage.write_new("x", b"1")
    with pytest.raises(StoreError, match="exists already"):
        storage.write_new("x", b"2")
    assert storage.read("x") == b"1" and storage.list() == ["x"]


def is_folder(descriptor):
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not say what a descriptor is of")
@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "ENOSYS", "EBADF"])
def test_a_filesystem_that_cannot_sync_folders_is_used(tmp_path, monkeypatch, name):
    refusing(monkeypatch, "fsync", getattr(errno, name), is_folder)
    storage = Storage.open(str(tmp_path))
    storage.check_writable()
    storage.write("a/x", b"1")
    assert storage.list() == ["a/x"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not say what a descriptor is of")
def test_a_disk_that_fails_as_a_folder_is_synced_is_an_error(tmp_path, monkeypatch):
    refusing(monkeypatch, "fsync", errno.EIO, is_folder)
    with pytest.raises(StoreError, match=r"cannot write write-probe"):
        Storage.open(str(tmp_path)).check_writable()
    assert list(tmp_path.iterdir()) == []


def test_the_probe_writes_as_a_run_does(tmp_path, monkeypatch):
    """What refuses the journal's first event must be known before anything expensive."""
    refusing(monkeypatch, "link", errno.EACCES)
    refusing(monkeypatch, "replace", errno.EACCES)
    with pytest.raises(StoreError, match=r"cannot write write-probe.*Permission denied"):
        Storage.open(str(tmp_path)).check_writable()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    config = on_pictures(top / "store", write_pictures(top / "images", side=8, train=12, test=6))
    prune(config, distributed=False, progress=Silent())
    return config, Storage.open(config.storage).child(config.name)


@pytest.fixture
def run(finished):
    """A finished run, put back as it was at the end."""
    config, storage = finished
    before = {name: storage.read(name) for name in storage.list()}
    yield config, storage
    for name in storage.list():
        if name not in before:
            storage.delete(name)
    for name, content in before.items():
        storage.write(name, content)


CUT_OFF = [b"", b'{"name": "a', b"\xff\xfe{"]
DAMAGED = [b"[]", b"null", b"3", b'"x"', b"[" * 100_000, *CUT_OFF]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_config_is_named_with_a_remedy(run, content):
    config, storage = run
    for name in storage.list("journal/"):  # whose first event would do instead
        storage.delete(name)
    storage.write("config.json", content)
    for use in (lambda: open_run(config), lambda: evaluate_run(storage.uri), lambda: dry_run(config)):
        with pytest.raises(StoreError, match=r"config\.json in .* is damaged: .*restore it from a copy"):
            use()
    storage.write("config.json", b'{"name": 3}')
    with pytest.raises(StoreError, match=r"settings of the run in .* cannot be used: config key model is missing"):
        evaluate_run(storage.uri)


@pytest.mark.parametrize(
    "content",
    [
        *(content for content in DAMAGED if content not in CUT_OFF),
        b"{}",
        b'{"schema_version": 2, "sequence": 1, "name": "start", "time": 0, "data": null}',
        b'{"schema_version": 2, "sequence": 1, "name": "start", "time": 0, "data": [1]}',
        b'{"schema_version": 2, "sequence": [], "name": "start", "time": 0, "data": {}}',
        b'{"schema_version": 2, "sequence": 1, "name": "start", "time": "x", "data": {}}',
        b'{"schema_version": 2, "sequence": 1, "name": "start", "time": 0, "data": {}}',
    ],
)
def test_a_damaged_event_is_named_with_a_remedy(run, content):
    config, storage = run
    for name in storage.list("journal/"):
        if not name.startswith("journal/000001"):
            storage.delete(name)
    storage.write("journal/000001-start.json", content)
    with pytest.raises(StoreError, match=r"journal/000001-start\.json in .*; restore it from a copy"):
        prune(config, distributed=False, progress=Silent())


@pytest.mark.parametrize("content", CUT_OFF)
def test_a_first_event_that_was_cut_off_begins_the_run_anew(run, content, caplog):
    config, storage = run
    for name in storage.list("journal/"):
        if not name.startswith("journal/000001"):
            storage.delete(name)
    storage.write("journal/000001-start.json", content)
    prune(config, distributed=False, progress=Silent())
    assert "journal/000001-start.json" in caplog.text and "is empty or cut off: it is passed over" in caplog.text
    assert storage.read_json("journal/000001-start.json")["name"] == "start"


def test_an_event_with_values_of_another_kind_is_named(run):
    config, storage = run
    names = storage.list("journal/")
    iteration = next(name for name in names if name.endswith("-iteration.json"))
    for name in names[names.index(iteration) + 1 :]:
        storage.delete(name)
    sequence = int(iteration[8:14])
    storage.write(
        iteration,
        b'{"schema_version":2,"sequence":%d,"name":"iteration","time":0,"data":{"step":3,"decision":4}}' % sequence,
    )
    with pytest.raises(
        StoreError, match=rf"{iteration} in .* is damaged: it lacks 'iteration'; restore it from a copy"
    ):
        prune(config, distributed=False, progress=Silent())


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("name", ["arch.json", "plan.json", "model.safetensors"])
def test_a_damaged_artifact_is_named(run, name, content):
    _, storage = run
    storage.write(f"pruned/{name}", content)
    with pytest.raises(ArtifactError, match=rf"{name} in .*restore it from a copy"):
        load_pruned(storage.uri)


def test_damaged_tensors_are_a_stores_error():
    for header in (b"[]", b"{}x", b'{"a": 1}', b'{"a": {"dtype": "F9", "shape": [1], "data_offsets": [0, 4]}}'):
        with pytest.raises(StoreError, match="here is no whole safetensors file"):
            unpack_tensors(len(header).to_bytes(8, "little") + header + b"1234", "here")
