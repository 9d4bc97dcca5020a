"""`report` on folders of runs and of sweeps: one page each, several side by side, and what it refuses."""

import html
import json
import re

import pytest
from page_runs import small_run, started, store
from run_events import run_finished

from laasp_ray.cli.report import report
from laasp_ray.report.page.several import sweep_page
from laasp_ray.report.sweep import SweepRow, sweep_json
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage
from laasp_ray.sweep.page import read_sweep

GOAL = {"kind": "targets", "flops_reductions": [0.3, 0.5]}


def words(page):
    body = re.sub(r"<(style|script)>.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def run_in(folder, name="small", **finish):
    events = small_run()
    events[0] = started(config={"name": name})
    events[-1] = run_finished(**(vars(events[-1]) | finish))
    return store(Storage.open(str(folder / name)), events)


def sweep_in(folder, *, finished):
    """A sweep with a finished trial, one that was stopped, and one that has not begun."""
    storage = Storage.open(str(folder / "swept"))
    journal = Journal(storage)
    config = dict(started(config={"name": "swept"}).config)
    journal.append("sweep", {"config": config, "goal": GOAL})
    run_in(folder / "swept", "flops-0.3")
    outcome = {"top1": 75.0, "stopped": "", "error": "", "curve": []}
    journal.append("trial", {"name": "flops-0.3", "outcome": outcome})
    journal.append("trial", {"name": "flops-0.5", "outcome": outcome | {"error": "no room"}})
    if finished:
        rows = [
            SweepRow(
                name="flops-0.3",
                target="30.00%",
                folder="x",
                status="finished",
                flops_reduction=0.31,
                macs=690,
                macs_unpruned=1000,
                parameters=70,
                parameters_unpruned=100,
                latency_ms=(8.0, 6.0),
                top1_before=90.0,
                top1_after=89.5,
                seconds=100.0,
                shared_seconds=40.0,
            ),
            SweepRow(name="flops-0.5", target="50.00%", folder="y", status="no room"),
        ]
        content = sweep_json(rows, goal=GOAL, rule="the rule", best="flops-0.3", said="found it", machine="a machine")
        storage.write("sweep.json", json.dumps(content).encode())
        journal.append("result", {"best": "flops-0.3", "said": "found it"})
    return storage


def test_a_run_s_page_is_in_its_folder(tmp_path, capsys):
    storage = run_in(tmp_path)
    assert report([str(tmp_path / "small")]) == 0
    assert capsys.readouterr().out.strip() == f"{storage.uri}/report.html"
    assert "small finished" in words(storage.read("report.html").decode())


def test_the_page_may_be_elsewhere(tmp_path, capsys):
    storage = run_in(tmp_path)
    assert report([str(tmp_path / "small"), "--out", str(tmp_path / "mine.html")]) == 0
    assert (tmp_path / "mine.html").is_file() and not storage.exists("report.html")


def test_a_finished_sweep_has_its_best_its_table_and_its_plots(tmp_path):
    storage = sweep_in(tmp_path, finished=True)
    assert report([storage.uri]) == 0
    page = storage.read("report.html").decode()
    said = words(page)
    for part in (
        "swept finished",
        "Asked: a network for each of 30%, 50% of FLOPs removed; torchvision.resnet50 on digits, by laasp.",
        "Came out: found it.",
        "The best is the rule.",
        "Best trial flops-0.3 target 30.00%",
        "FLOPs −31.00% 1.00 k → 690",
        "Top-1 89.50% 90.00% before pruning (−0.50 points)",
        "Latency −25.00% 8.00 → 6.00 ms",
        "Latencies were measured by turns with the unpruned network: a machine.",
        "1 of 2 trials finished.",
        "flops-0.3 30.00% −31.00% 690 70 6.00 of 8.00 90.00% 89.50% −0.50 1 min 00 s 40 s best",
        "flops-0.5 50.00% – – – – – – – 0 s – no room",
    ):
        assert part in said, part
    assert page.count("<svg") == 2 and not re.search(r"https?:", page)


def test_a_sweep_under_way_shows_what_there_is(tmp_path):
    storage = sweep_in(tmp_path, finished=False)
    run = store(Storage.open(str(tmp_path / "swept" / "flops-0.4")), small_run()[:3])
    said = words(sweep_page(read_sweep(storage), 0.0))
    assert "So far: 1 of 3 trials finished; the best one is chosen at the end." in said
    assert "flops-0.4 25.00% 0.00% – – – 50.00% – – 1 min 05 s under way" in said
    assert "flops-0.5 – – – – – – – 0 s no room" in said
    run.write("journal/000002-epoch.json", b"{}")
    rows = {row.name: row for row in read_sweep(storage).rows}
    assert "000002-epoch.json" in rows["flops-0.4"].status and rows["flops-0.3"].is_finished


def test_several_runs_are_side_by_side_with_what_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_in(tmp_path, "one")
    run_in(tmp_path, "two", macs=650, flops_reduction=0.5)
    sweep_in(tmp_path, finished=True)
    assert report(["one", "two", "swept"]) == 0
    assert capsys.readouterr().out.strip() == "comparison.html"
    page = (tmp_path / "comparison.html").read_text()
    said = words(page)
    for part in (
        "4 runs side by side 1 not finished",
        "On the Pareto front: two, swept/flops-0.3",
        "one 25.00% −36.54% 825 150 3.00 of 4.00 50.00% 75.00% +25.00 2 min 18 s – finished",
        "swept/flops-0.5",
        "All runs have the same settings, but for their names and storage.",
    ):
        assert part in said, part
    assert page.count("<svg") == 2


def test_runs_of_one_name_are_called_by_their_folders(tmp_path):
    for place in ("a", "b"):
        run_in(tmp_path / place)
    both = [str(tmp_path / place / "small") for place in ("a", "b")]
    assert report([*both, "--out", str(tmp_path / "out.html")]) == 0
    assert all(folder in words((tmp_path / "out.html").read_text()) for folder in both)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["{}/none"], "none holds no run: give the folder of a run or of a sweep"),
        (["{}/small", "{}/none"], "none holds no run"),
        (["{}/small", "--out", "{}/no/page.html"], "there is no folder"),
        (["{}/small", "--out", "{}"], "is a folder: give the name of a file in it"),
    ],
)
def test_what_is_no_run_or_no_place_is_refused(given, expected, tmp_path, capsys):
    run_in(tmp_path)
    assert report([text.format(tmp_path) for text in given]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
