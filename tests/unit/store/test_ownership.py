"""Whose a run is: one driver's, until it leaves or is known to be dead."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from laasp_ray.errors import StoreError
from laasp_ray.store import ownership
from laasp_ray.store.journal import Journal
from laasp_ray.store.ownership import see_owner, take
from laasp_ray.store.processes import this_process
from laasp_ray.store.storage import Storage


@pytest.fixture(params=["local", "arrow"])
def storage(request, tmp_path):
    return Storage.open(str(tmp_path / "run") if request.param == "local" else f"mock:///bucket{tmp_path}")


def wait_until(condition, seconds=60):
    """However slow the machine is."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def from_elsewhere(owner, storage):
    """As if another host's driver had taken the run: whether it lives can only be seen by its heartbeat."""
    process = dataclasses.replace(owner.token.process, host="far", machine="another")
    token = dataclasses.replace(owner.token, process=process)
    storage.write(f"owner/{owner.attempt:06d}.json", json.dumps(dataclasses.asdict(token)).encode())


def test_a_run_of_which_nothing_is_stored_leaves_no_trace(storage, tmp_path):
    take(storage).release()
    assert storage.list() == [] and not (tmp_path / "run").exists()


def test_a_run_that_was_let_go_is_taken_at_once(storage):
    first = take(storage)
    Journal(storage, first).append("start", {})
    first.release()
    first.release()
    second = take(storage)
    assert second.attempt == 2 and Journal(storage).last_attempt() == 1
    assert storage.list("owner/") == ["owner/000002.json"]
    second.release()
    with pytest.raises(StoreError, match=r"another driver has taken over the run"):
        first.ensure()


def test_who_lives_is_named(storage):
    owner = take(storage, beat_s=0.2)
    from_elsewhere(owner, storage)
    with pytest.raises(
        StoreError, match=r"host far, process \d+, since \d{4}-.*; last heartbeat \d{4}-.* it lives: stop that one"
    ):
        take(storage)
    owner.release()


def test_a_first_heartbeat_that_comes_between_two_looks_is_read(storage, monkeypatch):
    owner = take(storage, beat_s=60)
    read_json, looked = Storage.read_json, []

    def read(self, name, *rest):
        """The heartbeat is not there yet at the first look, and is right after it."""
        if name.endswith(".beat") and not looked:
            looked.append(name)
            try:
                return read_json(self, name, *rest)
            finally:
                owner._write_beat(left=False)
        return read_json(self, name, *rest)

    monkeypatch.setattr(Storage, "read_json", read)
    seen = see_owner(storage)
    assert (seen.beats, len(looked)) == (1, 1) and seen.at.endswith("UTC")
    owner.release()


def test_who_is_silent_is_dead_and_writes_nothing_any_more(storage, caplog):
    first = take(storage, beat_s=0.1)
    journal = Journal(storage, first)
    journal.append("start", {})
    from_elsewhere(first, storage)
    first._released.set()  # its heart stands still
    second = take(storage)
    assert second.attempt == 2 and "gave no sign of life" in caplog.text
    before = storage.list()
    guarded = storage.guarded(first.ensure)
    for write in (
        lambda: journal.append("epoch", {}),
        lambda: guarded.write("checkpoints/x", b""),
        lambda: guarded.child("pruned").write("arch.json", b""),
        lambda: guarded.delete("journal/000001-start.json"),
    ):
        with pytest.raises(StoreError, match=r"has taken over .*attempt 1.*it has written nothing since and ends here"):
            write()
    assert storage.list() == before
    second.release()


def test_a_write_that_was_under_way_as_the_run_was_lost_does_not_count(storage):
    first = take(storage, beat_s=0.05)
    Journal(storage, first).append("start", {})
    first._released.set()
    from_elsewhere(first, storage)
    second = take(storage)
    journal = Journal(storage, second)
    assert len(journal.events()) == 1

    class Late:
        attempt, ensure = 1, staticmethod(lambda: None)

    late = Journal(storage, Late())
    late.append("epoch", {"whose": "the late one's"})
    assert journal.append("iteration", {"whose": "the owner's"}).sequence == 2
    late._written = 1
    storage.write("journal/000002-calibration.json", late_event())
    assert [event.name for event in Journal(storage).events()] == ["start", "iteration"]
    assert journal.append("epoch", {}).sequence == 3
    second.release()


def late_event():
    event = {"schema_version": 2, "sequence": 2, "name": "calibration", "time": 0.0, "attempt": 1, "data": {}}
    return json.dumps(event).encode()


DRIVER = """
import sys, time
from laasp_ray.store.journal import Journal
from laasp_ray.store.ownership import see_owner, take
from laasp_ray.store.storage import Storage
storage = Storage.open(sys.argv[1])
owner = take(storage, beat_s=0.2)
journal = Journal(storage, owner)
journal.append("start", {})
print("ready", flush=True)
sys.stdin.readline()
try:
    journal.append("epoch", {"whose": "the first one's"})
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


@pytest.fixture
def driver(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    yield process, Storage.open(str(tmp_path / "run"))
    process.kill()
    process.communicate()


def test_a_driver_that_is_stopped_and_wakes_up_finds_out_before_it_writes(driver):
    process, storage = driver
    with pytest.raises(StoreError, match=rf"process {process.pid}.* it lives"):
        take(storage)
    os.kill(process.pid, signal.SIGSTOP)
    owner = take(storage)
    os.kill(process.pid, signal.SIGCONT)
    said, _ = process.communicate("go on\n", timeout=60)
    assert said.startswith("StoreError another driver has taken over the run in"), said
    assert storage.list("journal/") == ["journal/000001-start.json"]
    owner.release()


@pytest.mark.skipif(this_process().machine == "", reason="this system does not tell its processes")
def test_a_driver_of_this_machine_that_is_gone_is_not_waited_for(driver):
    process, storage = driver
    os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.2)  # it is not reaped: its remains count as gone
    began = time.monotonic()
    owner = take(storage)
    assert owner.attempt == 2 and time.monotonic() - began < 1.0
    owner.release()


def test_a_heart_outlives_a_store_that_fails(tmp_path, monkeypatch, caplog):
    storage = Storage.open(str(tmp_path))
    owner = take(storage, beat_s=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        wait_until(lambda: "a heartbeat could not be written" in caplog.text)
        time.sleep(0.3)  # it fails several times, and says so once
    assert caplog.text.count("a heartbeat could not be written") == 1
    first = ownership._read_beat(storage, 1)
    wait_until(lambda: ownership._read_beat(storage, 1) != first)
    owner.release()


@pytest.mark.parametrize("content", [b"", b'{"schema_ver', b"\0\0\0\0"])
def test_a_last_event_that_was_cut_off_is_passed_over_with_a_note(storage, caplog, content):
    journal = Journal(storage)
    for name in ("start", "epoch", "iteration"):
        journal.append(name, {})
    storage.write("journal/000003-iteration.json", content)
    with caplog.at_level(logging.WARNING):
        again = Journal(storage)
        assert [event.name for event in again.events()] == ["start", "epoch"] and again.last("iteration") is None
    assert caplog.text.count("journal/000003-iteration.json") == 1 and "passed over" in caplog.text
    assert again.append("epoch", {"number": 3}).sequence == 3
    assert [event.name for event in Journal(storage).events()] == ["start", "epoch", "epoch"]
    storage.write("journal/000002-epoch.json", content)
    with pytest.raises(StoreError, match=r"journal/000002-epoch\.json in .* restore it from a copy"):
        Journal(storage).events()
