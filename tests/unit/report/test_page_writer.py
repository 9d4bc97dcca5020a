"""Pages while a run goes on: how often, and that trouble with them ends nothing."""

import logging

import pytest
from fakes import Silent
from helpers import write_pictures
from page_runs import small_run, store
from run_events import epoch_done, run_finished
from whole_runs import on_pictures, read_events_of

from laasp_ray import prune
from laasp_ray.records import RunState
from laasp_ray.report.page import writer
from laasp_ray.report.page.facts import layers_of
from laasp_ray.report.page.reading import RunReader
from laasp_ray.run.events import PhaseStarted
from laasp_ray.store.storage import Storage

pytestmark = pytest.mark.usefixtures("pages")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.mark.parametrize("place", ["folder", "mock:///bucket/run"])
def test_a_page_is_written_in_the_run_s_folder_at_its_end(place, tmp_path, clock):
    storage = Storage.open(str(tmp_path / "run") if place == "folder" else place)
    store(storage, small_run())
    made = writer.PageWriter(storage, clock)
    made.on_event(run_finished(), RunState())
    assert b"resnet50_digits" in storage.read("report.html")
    storage.delete("report.html")
    made.close()
    assert not storage.exists("report.html")


def test_pages_come_once_a_minute_at_most_and_take_a_hundredth_of_the_time(tmp_path, clock, monkeypatch):
    storage = store(Storage.open(str(tmp_path)), small_run()[:3])
    made, written = writer.PageWriter(storage, clock), []

    def slow(record):
        clock.now += 2.0
        written.append(clock.now)
        return "page"

    monkeypatch.setattr(writer, "run_page", slow)
    for at in (1, 59, 60, 61, 200, 261, 262):
        clock.now = max(clock.now, at)
        made.on_event(epoch_done(), RunState())
        made.on_event(PhaseStarted(phase="train", detail=""), RunState())
    assert written == [62.0, 264.0]  # 200 seconds after a page that took 2
    made.on_event(epoch_done(), RunState())
    made.close()
    made.close()
    assert written == [62.0, 264.0, 266.0]


def test_trouble_is_said_once_until_it_works_again(tmp_path, clock, caplog):
    (tmp_path / "report.html").mkdir()  # in the way
    storage = store(Storage.open(str(tmp_path)), small_run()[:3])
    made = writer.PageWriter(storage, clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            clock.now += 100
            made.on_event(epoch_done(), RunState())
        assert caplog.text.count("report.html could not be written, it is tried again later") == 1
        (tmp_path / "report.html").rmdir()
        made.close()
        assert (tmp_path / "report.html").is_file()


def test_a_damaged_journal_does_not_end_the_run(tmp_path, clock, caplog):
    storage = store(Storage.open(str(tmp_path)), small_run()[:3])
    storage.write("journal/000002-epoch.json", b"{}")
    writer.PageWriter(storage, clock).on_event(run_finished(), RunState())
    assert "report.html could not be written" in caplog.text


def test_a_whole_run_has_its_page_and_its_machine(tmp_path):
    pictures = write_pictures(tmp_path / "images", side=8, train=12, test=6)
    config = on_pictures(tmp_path / "runs", pictures)
    prune(config, distributed=False, progress=Silent())
    page = (tmp_path / "runs" / config.name / "report.html").read_text()
    start, *_, finish = read_events_of(config)
    assert start.machine["workers"] == "one process, without Ray" and start.machine["driver"] in page
    assert sum(start.macs_by_layer.values()) == start.macs
    assert ">finished<" in page
    record = RunReader(Storage.open(config.storage).child(config.name)).read()
    assert sum(layer.macs_now for layer in layers_of(record)) == finish.macs
