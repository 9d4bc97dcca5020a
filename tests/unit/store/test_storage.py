"""The folder of a run, on the local disk and on pyarrow's in-process filesystem."""

import os
import pickle
import subprocess
import sys
import threading

import pytest

from laasp_ray.errors import StoreError
from laasp_ray.store.storage import Storage, _LocalFolder


@pytest.fixture(params=["local", "arrow"])
def storage(request, tmp_path):
    return Storage.open(str(tmp_path / "run") if request.param == "local" else "mock:///bucket/run")


def test_what_is_written_is_read_replaced_listed_and_deleted(storage):
    storage.write("a/b.bin", b"one")
    storage.write("a/b.bin", b"two")
    storage.write("c.bin", b"")
    assert storage.read("a/b.bin") == b"two"
    assert storage.read("c.bin") == b""
    assert storage.list() == ["a/b.bin", "c.bin"]
    assert storage.list("a/") == ["a/b.bin"]
    assert storage.list("a/x") == []
    assert storage.list("c") == ["c.bin"]
    assert storage.exists("a/b.bin") and not storage.exists("a")
    storage.delete("a/b.bin")
    assert storage.list() == ["c.bin"]


def test_a_folder_that_does_not_exist_is_empty(storage):
    assert storage.list() == [] and storage.list("journal/") == [] and not storage.exists("x")


def test_missing_names_are_errors_that_name_them(storage):
    with pytest.raises(StoreError, match=r"cannot read nothing/here in .*run: it does not exist"):
        storage.read("nothing/here")
    with pytest.raises(StoreError, match=r"cannot delete nothing"):
        storage.delete("nothing")


def test_write_new_refuses_what_exists(storage):
    storage.write_new("a/once", b"first")
    with pytest.raises(StoreError, match=r"a/once in .* exists already"):
        storage.write_new("a/once", b"second")
    assert storage.read("a/once") == b"first"
    assert storage.list() == ["a/once"]


def test_child_is_the_folder_below(storage):
    storage.child("pruned").write("arch.json", b"{}")
    assert storage.read("pruned/arch.json") == b"{}"
    assert storage.child("pruned").list() == ["arch.json"]
    assert storage.child("pruned").uri == storage.uri + "/pruned"


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../../x", "a//b", "./a", "a\\b"])
def test_names_stay_inside(storage, name):
    with pytest.raises(StoreError, match=r"no name inside"):
        storage.write(name, b"")


def test_check_writable_leaves_nothing(storage):
    storage.check_writable()
    assert storage.list() == []


def test_local_paths_and_file_uris(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Storage.open("runs/one").local_path == tmp_path / "runs" / "one"
    assert Storage.open("runs/one").uri == str(tmp_path / "runs" / "one")
    spaced = Storage.open(f"file://{tmp_path}/with%20space")
    assert spaced.local_path == tmp_path / "with space"
    assert spaced.child("x").local_path == tmp_path / "with space" / "x"
    assert Storage.open("mock:///bucket/run").local_path is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s4://bucket/run", "cannot open the storage s4://bucket/run.*s3://bucket/path"),
        ("mock://", "names no bucket or folder"),
        ("file://elsewhere/x", "three slashes"),
        ("", "empty path"),
    ],
)
def test_bad_uris_are_errors_with_a_remedy(uri, message):
    with pytest.raises(StoreError, match=message):
        Storage.open(uri)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file is a file, a folder is needed"):
        Storage.open(str(tmp_path / "file"))
    with pytest.raises(StoreError, match=r"cannot write write-probe.*name another folder"):
        Storage.open(str(tmp_path / "file" / "below")).check_writable()


def test_where_a_folder_will_be_made_is_tried_and_none_is_made(tmp_path, monkeypatch):
    tried = []
    write = _LocalFolder.write
    monkeypatch.setattr(_LocalFolder, "write", lambda self, *given: (tried.append(self.path), write(self, *given)))
    (tmp_path / "runs").mkdir()
    Storage.open(str(tmp_path / "runs" / "a" / "b")).check_writable()
    Storage.open(str(tmp_path / "runs")).check_writable()
    assert tried == [tmp_path / "runs"] * 2
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "gone")  # a volume that is not there, say
    with pytest.raises(StoreError, match=r"not a folder: .*link"):
        Storage.open(str(tmp_path / "link" / "run")).check_writable()


def test_child_of_a_uri_with_options_keeps_them_at_the_end():
    # An S3 filesystem is made without reaching anything when endpoint and region are given.
    run = Storage.open("s3://bucket/runs?region=us-east-1&endpoint_override=localhost:1&scheme=http").child("one")
    assert run.uri == "s3://bucket/runs/one?region=us-east-1&endpoint_override=localhost:1&scheme=http"


def test_a_reader_never_sees_a_part_of_a_write(tmp_path):
    storage = Storage.open(str(tmp_path))
    contents = [bytes([digit]) * 300_000 for digit in range(2)]
    storage.write("x", contents[0])
    seen, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            seen.add(storage.read("x"))

    reader = threading.Thread(target=read)
    reader.start()
    for iteration in range(40):
        storage.write("x", contents[iteration % 2])
    stop.set()
    reader.join()
    assert seen <= set(contents) and seen


def test_a_failed_write_keeps_the_old_content_and_leaves_nothing_aside(tmp_path, monkeypatch):
    storage = Storage.open(str(tmp_path))
    storage.write("x", b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match=r"cannot write x in .*No space left"):
        storage.write("x", b"new")
    assert storage.read("x") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_of_many_concurrent_writers_exactly_one_wins(tmp_path):
    storage = Storage.open(str(tmp_path))
    won, start = [], threading.Barrier(8)

    def write(number):
        start.wait()
        try:
            storage.write_new("claim", str(number).encode())
        except StoreError:
            return
        won.append(number)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(won) == 1 and storage.read("claim") == str(won[0]).encode()


def test_without_hard_links_writing_new_still_works_and_refuses(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    storage = Storage.open(str(tmp_path))
    storage.write_new("x", b"1")
    with pytest.raises(StoreError, match=r"exists already"):
        storage.write_new("x", b"2")
    assert storage.read("x") == b"1" and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_leftovers_are_hidden_and_old_ones_removed(tmp_path):
    storage = Storage.open(str(tmp_path))
    storage.write("a/x", b"")
    for name in (".x.1.tmp", ".x.2.tmp"):
        (tmp_path / "a" / name).write_bytes(b"half")
    os.utime(tmp_path / "a" / ".x.1.tmp", (0, 0))
    assert storage.list() == ["a/x"]
    storage.delete_leftovers("a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".x.2.tmp", "x"]


def test_storage_travels_between_processes(tmp_path):
    storage = pickle.loads(pickle.dumps(Storage.open(str(tmp_path)).child("run")))
    storage.write("x", b"1")
    assert (tmp_path / "run" / "x").read_bytes() == b"1"


def test_local_use_needs_no_pyarrow(tmp_path):
    code = (
        "import sys; from laasp_ray.store.storage import Storage; s = Storage.open(sys.argv[1]); s.write('x', b'1'); "
        "assert s.read('x') == b'1' and s.list() == ['x']; assert 'pyarrow' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
