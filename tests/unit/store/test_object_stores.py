"""A run's folder on real servers that speak S3 and Google Cloud Storage, alike and under faults."""

import logging
import threading
import time

import pytest
from fault_proxy import FULL, SLOW_DOWN, Refusal
from object_stores import KEY, SECRET

from laasp_ray.errors import StoreError
from laasp_ray.store import ownership, storage
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage

WRITES = ("PUT", "POST")


@pytest.fixture
def folder(object_store, request, monkeypatch):
    """A folder of this test's own, with patience for seconds."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(storage, "PATIENCE_S", 20.0)
    monkeypatch.setattr(storage, "BRIEF_S", 2.0)
    yield Storage.open(object_store.uri("runs")).child(request.node.name.partition("[")[0])
    object_store.proxy.set(None)


def test_it_is_a_folder_like_any_other(folder):
    folder.check_writable()
    assert folder.list() == []
    folder.write("a/x", b"1")
    folder.write("a/x", b"2")
    folder.write_new("a/y", b"3")
    assert (folder.read("a/x"), folder.list(), folder.exists("a")) == (b"2", ["a/x", "a/y"], False)
    with pytest.raises(StoreError, match=r"cannot write a/y in .*exists already"):
        folder.write_new("a/y", b"4")
    folder.write_new("a/y", b"3")  # the very same: an answer was lost
    with pytest.raises(StoreError, match=r"cannot read a/z in .*does not exist"):
        folder.read("a/z")
    folder.delete("a/x")
    assert folder.list() == ["a/y"]


def test_of_many_writers_at_once_one_wins(folder):
    won, start = [], threading.Barrier(6)

    def write(number):
        start.wait()
        for key in range(5):
            try:
                folder.write_new(f"claim-{key}", str(number).encode())
            except StoreError:
                continue
            won.append((key, number))

    writers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(key for key, _ in won) == list(range(5))
    assert all(folder.read(f"claim-{key}") == str(number).encode() for key, number in won)


@pytest.mark.parametrize("fault", [SLOW_DOWN, "reset", "lost"], ids=["503", "reset", "lost"])
def test_a_journal_is_whole_though_every_third_write_fails(object_store, folder, fault):
    seen = [0]

    def policy(method, path, number):
        seen[0] += method in WRITES
        return fault if method in WRITES and seen[0] % 3 == 0 else None

    object_store.proxy.set(policy)
    folder = folder.child(str(id(fault)))
    journal = Journal(folder)
    for number in range(7):
        journal.append("epoch", {"number": number})
    assert object_store.proxy.broken >= 2
    object_store.proxy.set(None)
    assert [event.data["number"] for event in Journal(folder).events()] == list(range(7))
    assert len(folder.list()) == 7


@pytest.mark.parametrize("size", [300_000, 11_000_000])
@pytest.mark.parametrize("fault", ["reset", "lost"])
def test_an_object_is_whole_whichever_of_its_requests_is_lost(object_store, folder, fault, size):
    """Of Google's uploads in parts, a repeated part was stored twice."""
    data = bytes(range(250)) * (size // 250)
    for number in range(1, 6):
        writes = []

        def policy(method, path, _, number=number, writes=writes):
            writes.extend([path] if method in WRITES else [])
            return fault if method in WRITES and len(writes) == number else None

        object_store.proxy.set(policy)
        folder.write("x", data)
        object_store.proxy.set(None)
        assert folder.read("x") == data, f"request {number} of {len(writes)}"
        folder.write("x", b"")
        if number >= len(writes):
            break


def test_a_store_that_is_down_for_seconds_is_waited_for_with_one_line(object_store, folder, caplog):
    until = time.monotonic() + 5
    object_store.proxy.set(lambda *_: "reset" if time.monotonic() < until else None)
    with caplog.at_level(logging.WARNING):
        folder.write_new("x", b"1")
    assert folder.read("x") == b"1"
    lines = [record.getMessage() for record in caplog.records]
    assert sum("trying again for up to 20 s" in line for line in lines) == 1
    assert sum("answers again" in line for line in lines) == 1
    assert not [line for line in lines if KEY in line or SECRET in line]


def test_a_store_that_stays_away_ends_in_a_sentence(object_store, folder, monkeypatch):
    monkeypatch.setattr(folder, "_patience_s", 1.0)
    object_store.proxy.set(lambda *_: SLOW_DOWN)
    with pytest.raises(StoreError, match=r"cannot write x in .*: it does not answer as it should .*goes on with the r"):
        folder.write_new("x", b"1")


@pytest.mark.parametrize("write", ["write", "write_new"])
def test_a_full_store_is_told_at_once_and_used_after_room_is_made(object_store, folder, write):
    object_store.proxy.set(lambda method, *_: FULL if method in WRITES else None)
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"cannot write x in .*: it is full .*make room there, then the same command"):
        getattr(folder, write)("x", b"1")
    assert time.monotonic() - began < 15
    object_store.proxy.set(None)
    getattr(folder, write)("x", b"1")
    assert folder.read("x") == b"1"


PERMANENT = [
    (Refusal(400, "ExpiredToken"), "its credentials have expired .*renew them"),
    (Refusal(403, "InvalidAccessKeyId"), "its credentials are missing or wrong .*check them"),
    (Refusal(403, "AccessDenied"), "permission is denied .*reading, writing, listing and deleting"),
    (Refusal(404, "NoSuchBucket"), "there is no such bucket .*make the bucket"),
]


@pytest.mark.parametrize(("refusal", "message"), PERMANENT, ids=[refusal.code for refusal, _ in PERMANENT])
@pytest.mark.parametrize("write", ["write", "write_new"])
def test_what_will_not_pass_is_told_at_once_with_the_remedy(object_store, folder, write, refusal, message):
    if object_store.scheme == "gs" and refusal.code in ("ExpiredToken", "InvalidAccessKeyId"):
        pytest.skip("the answers of S3 alone")
    object_store.proxy.set(lambda *_: refusal)
    began = time.monotonic()
    with pytest.raises(StoreError, match=rf"cannot write x in .*{message}") as caught:
        getattr(folder, write)("x", b"1")
    assert time.monotonic() - began < 10
    assert KEY not in str(caught.value) and SECRET not in str(caught.value)


def test_wrong_keys_and_a_missing_bucket_of_the_servers_own(object_store, folder):
    if object_store.scheme == "s3":
        wrong = Storage.open(object_store.uri("runs", secret="WRONG/SECRET"))
        message = "credentials are missing or wrong|permission is denied"
    else:
        wrong, message = Storage.open(object_store.uri("runs", bucket="missing")), "there is no such bucket"
    with pytest.raises(StoreError, match=message) as caught:
        wrong.check_writable()
    assert "WRONG" not in str(caught.value) and KEY not in str(caught.value)


def test_a_second_driver_is_refused_and_takes_over_from_a_dead_one(object_store, folder, monkeypatch):
    first = ownership.take(folder, beat_s=0.4)
    first_journal = Journal(folder, first)
    first_journal.append("start", {})
    elsewhere = pretend_to_be_elsewhere(monkeypatch)
    with pytest.raises(StoreError, match=r"another driver has the run .*host .*process \d+.* it lives: stop that one"):
        ownership.take(folder)
    first._released.set()  # SIGSTOP stops the heart, too
    second = ownership.take(folder, beat_s=0.4)
    assert (second.attempt, second.token.process) == (2, elsewhere)
    before = folder.list("journal/")
    with pytest.raises(StoreError, match=r"another driver has taken over the run in .*elsewhere.*attempt 1"):
        first_journal.append("epoch", {})
    assert folder.list("journal/") == before
    assert Journal(folder, second).append("epoch", {}).attempt == 2
    second.release()
    third = ownership.take(folder)
    assert third.attempt == 3
    third.release()


@pytest.mark.parametrize("fault", ["lost", "reset"])
def test_taking_a_run_though_the_answer_is_lost(object_store, folder, fault):
    done = []

    def policy(method, path, number):
        if method in WRITES and not done:
            done.append(path)
            return fault
        return None

    object_store.proxy.set(policy)
    owner = ownership.take(folder.child(fault))
    assert done and owner.attempt == 1
    owner.release()


def pretend_to_be_elsewhere(monkeypatch):
    from laasp_ray.store.processes import Process

    elsewhere = Process("elsewhere", 7, "another machine", "1")
    monkeypatch.setattr(ownership, "this_process", lambda: elsewhere)
    return elsewhere
