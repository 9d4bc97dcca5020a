"""`status` on folders of real runs: finished, cut off, and none at all."""

import json

import pytest
from fakes import Silent
from helpers import write_pictures
from whole_runs import on_pictures, power_cut

from laasp_ray import prune
from laasp_ray.cli.status import status
from laasp_ray.store.ownership import take
from laasp_ray.store.storage import Storage


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a finished run and one that was cut off, and one that never began."""
    pictures = write_pictures(tmp_path_factory.mktemp("images"), side=8, train=12, test=6)
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    for name, events in (("whole", None), ("cut", 3)):
        config = on_pictures(folder, pictures, name=name)
        if events is None:
            prune(config, distributed=False, progress=Silent())
        else:
            with power_cut(patch, events):
                prune(config, distributed=False, progress=Silent())
    (folder / "other").mkdir()
    return folder


def test_one_run(runs, capsys):
    assert status([str(runs / "whole")]) == 0
    said = capsys.readouterr().out
    assert "the run is finished" in said and "phase" in said and "done" in said
    assert status([str(runs / "cut"), "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert (read["driver"], read["attempts"], read["events"]) == ("stopped", 1, 3)


def test_a_run_whose_driver_works_is_told_from_one_that_is_silent(runs, capsys, monkeypatch):
    storage = Storage.open(str(runs)).child("cut")
    owner = take(storage, beat_s=0.05)
    try:
        assert status([str(runs / "cut"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["driver"] == "works"
        owner._released.set()  # its heartbeat ends, and it has not let go
        owner._thread.join()
        assert status([str(runs / "cut"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["driver"] == "silent"
    finally:
        owner._released.clear()
        owner.release()


def test_all_runs_of_a_folder(runs, capsys):
    assert status(["--storage", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["cut", "stopped"], ["whole", "finished"]]
    damaged = runs / "damaged" / "journal"
    damaged.mkdir(parents=True)
    (damaged / "000001-start.json").write_text("{}")
    (damaged / "000002-epoch.json").write_text("{}")
    assert status(["--storage", str(runs)]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 4 and said.err.startswith("damaged: ")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "give either a run's folder, or --storage"),
        (["x", "--storage", "y"], "give either a run's folder, or --storage"),
        (["--storage", "y", "--watch"], "--watch shows one run as text"),
        (["x", "--watch", "--json"], "--watch shows one run as text"),
    ],
)
def test_flags_that_do_not_go_together(given, expected, capsys):
    assert status(given) == 2
    assert expected in capsys.readouterr().err


def test_a_folder_without_a_run_is_named(runs, capsys):
    assert status([str(runs / "other")]) != 0
    assert "holds no run: give the folder of a run" in capsys.readouterr().err


def test_watching_ends_with_the_run(runs, capsys):
    assert status([str(runs / "whole"), "--watch"]) == 0
    assert "the run is finished" in capsys.readouterr().out
