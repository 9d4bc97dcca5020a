"""The journal: what is written is what is read, and nothing else is accepted."""

import io
import json
import math

import pyarrow.parquet as parquet
import pytest

from laasp_ray.errors import StoreError
from laasp_ray.records import Candidate, CandidateLoss, Decision, MeasuredLoss, Ranking
from laasp_ray.store.journal import Event, Journal, write_candidates
from laasp_ray.store.storage import Storage


@pytest.fixture(params=["local", "arrow"])
def storage(request, tmp_path):
    return Storage.open(str(tmp_path) if request.param == "local" else "mock:///bucket/run")


def test_events_come_back_in_order(storage):
    journal = Journal(storage)
    assert journal.events() == [] and journal.last("epoch") is None
    written = [
        journal.append("start", {"macs": 3}),
        journal.append("epoch", {"loss": 0.5}),
        journal.append("epoch", {"loss": 0.25}),
    ]
    assert storage.list() == [
        "journal/000001-start.json",
        "journal/000002-epoch.json",
        "journal/000003-epoch.json",
    ]
    assert Journal(storage).events() == written == journal.events()
    assert journal.last("epoch") == written[2] and journal.last("start") == written[0]
    assert [event.sequence for event in written] == [1, 2, 3]


def test_more_than_a_folder_of_names_sorts_right(storage):
    journal = Journal(storage)
    for number in range(12):
        journal.append("epoch", {"number": number})
    assert [event.data["number"] for event in journal.events()] == list(range(12))


def test_time_is_the_wall_clock(storage, monkeypatch):
    monkeypatch.setattr("laasp_ray.store.journal.time.time", lambda: 1234.5)
    Journal(storage).append("start", {})
    assert Journal(storage).events() == [Event(1, "start", {}, 1234.5)]


def test_dataclasses_and_non_finite_numbers_have_a_json_form(storage):
    decision = Decision(
        iteration=1, layer="conv", criterion="l1", filters=(2, 5), loss=math.inf, loss_before=0.5, flops_reduction=0.125
    )
    Journal(storage).append("iteration", {"decision": decision, "nan": math.nan})
    data = Journal(storage).last("iteration").data
    assert data["decision"]["filters"] == [2, 5] and data["decision"]["loss"] == "inf" and data["nan"] == "nan"
    assert math.isnan(float(data["nan"]))


def test_a_resumed_journal_goes_on(storage):
    Journal(storage).append("start", {})
    journal = Journal(storage)
    journal.events()
    assert journal.append("epoch", {}).sequence == 2


def test_a_second_driver_is_noticed_by_the_first(storage):
    first, second = Journal(storage), Journal(storage)
    first.append("start", {})
    second.append("epoch", {})
    with pytest.raises(StoreError, match=r"another driver writes the run in .*: 2 events where this one left 1"):
        first.append("epoch", {})
    assert len(Journal(storage).events()) == 2


@pytest.mark.parametrize("name", ["start", "iteration"])
def test_two_drivers_in_the_same_moment(storage, name):
    """The rival writes its event of the same number between our look and our write."""

    class Raced(Storage):
        def write_new(self, file, data):
            rival.append(name, {"who": "rival"})
            super().write_new(file, data)

    rival = Journal(storage)
    with pytest.raises(StoreError, match=r"another driver|exists already"):
        Journal(Raced(storage.uri, storage._folder)).append("start", {"who": "us"})
    assert [event.data["who"] for event in Journal(storage).events()] == ["rival"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.delete("journal/000002-epoch.json"),
            "broken at journal/000003-iteration.json: the one before is missing",
        ),
        (
            lambda s: s.write("journal/000002-iteration.json", s.read("journal/000002-epoch.json")),
            "broken at journal/000002-iteration.json: a number twice",
        ),
        (lambda s: s.write("journal/notes.txt", b""), "journal/notes.txt is no file of a journal"),
        (lambda s: s.write("journal/000002-epoch.json", b"{"), "journal/000002-epoch.json in .* not JSON.*restore"),
        (lambda s: s.write("journal/000002-epoch.json", b"[]"), "journal/000002-epoch.json in .* holds a list"),
        (lambda s: s.write("journal/000002-epoch.json", s.read("journal/000003-iteration.json")), "renamed or copied"),
    ],
)
def test_a_broken_journal_is_refused(storage, change, message):
    journal = Journal(storage)
    for name in ("start", "epoch", "iteration"):
        journal.append(name, {})
    change(storage)
    with pytest.raises(StoreError, match=message):
        Journal(storage).events()


def test_hidden_files_of_others_do_no_harm(storage):
    journal = Journal(storage)
    journal.append("start", {})
    storage.write("journal/.nfs000012", b"")
    assert journal.append("epoch", {}).sequence == 2 and len(Journal(storage).events()) == 2


def test_events_are_written_without_blanks(storage):
    Journal(storage).append("iteration", {"filters": [1, 2], "loss": 0.5})
    assert b'"data":{"filters":[1,2],"loss":0.5}}' in storage.read("journal/000001-iteration.json")


def test_another_schema_version_is_refused(storage):
    Journal(storage).append("start", {})
    content = json.loads(storage.read("journal/000001-start.json"))
    storage.write("journal/000001-start.json", json.dumps({**content, "schema_version": 99}).encode())
    with pytest.raises(StoreError, match=r"schema version 99"):
        Journal(storage).events()


def test_an_events_name_is_checked(storage):
    with pytest.raises(StoreError, match=r"'Two words' is no name of an event"):
        Journal(storage).append("Two words", {})


def rows_of(storage, iteration):
    return parquet.read_table(io.BytesIO(storage.read(f"candidates/{iteration:06d}.parquet"))).to_pylist()


def test_candidates_are_a_table_of_a_row_each(storage):
    entries = [
        CandidateLoss(
            candidate=Candidate(layer="b", criterion="l2", filters=(0, 7), flops_reduction=0.25),
            measured=MeasuredLoss(2.5, 60, 0.5, dropped_at=3, copied="norm normalises"),
        ),
        CandidateLoss(
            candidate=Candidate(layer="a", criterion="l1", filters=(3,), flops_reduction=0.125, also=(("a", "l2"),)),
            measured=MeasuredLoss(1.5, 100),
        ),
        CandidateLoss(
            candidate=Candidate(layer="c", criterion="l1", filters=(1,), flops_reduction=0.1),
            measured=MeasuredLoss(math.inf, 100, error="RuntimeError: broken"),
        ),
    ]
    write_candidates(storage, 12, Ranking(entries))
    assert storage.list() == ["candidates/000012.parquet"]
    columns = (
        *("rank", "layer", "criterion", "filters", "loss", "images", "seconds", "flops_reduction"),
        *("dropped_at", "error", "copied", "also"),
    )
    rows = rows_of(storage, 12)
    assert [tuple(row) for row in rows] == [columns] * 3
    assert [tuple(row.values()) for row in rows] == [
        (1, "a", "l1", [3], 1.5, 100, 0.0, 0.125, None, "", "", [{"layer": "a", "criterion": "l2"}]),
        (2, "b", "l2", [0, 7], 2.5, 60, 0.5, 0.25, 3, "", "norm normalises", []),
        (3, "c", "l1", [1], math.inf, 100, 0.0, 0.1, None, "RuntimeError: broken", "", []),
    ]


def test_an_empty_ranking_is_an_empty_table(storage):
    write_candidates(storage, 1, Ranking([]))
    assert rows_of(storage, 1) == []
