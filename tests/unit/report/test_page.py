"""The page of a run, from journals by hand: what it says, and that it refers to nothing else."""

import dataclasses
import html
import math
import re
from html.parser import HTMLParser

import pytest
from page_runs import LATENCY, big_run, pruned, small_run, started, store
from run_events import epoch_done, iteration_done, run_started

from laasp_ray.errors import StoreError
from laasp_ray.export.latency import EngineLatency
from laasp_ray.export.network import Export
from laasp_ray.records import Metrics
from laasp_ray.report.page import facts
from laasp_ray.report.page.reading import RunReader, RunRecord
from laasp_ray.report.page.run import run_page
from laasp_ray.report.page.settings import settings_of
from laasp_ray.run.events import (
    EpochDone,
    FaultSurvived,
    ImageExcluded,
    IterationDone,
    LatencyMeasured,
    NetworkExported,
)
from laasp_ray.store.journal import write_candidates
from laasp_ray.store.storage import Storage

NOW = 1_800_000_000.0


def record_of(events, **changes):
    values = {"name": "run", "uri": "runs/run", "times": [NOW + number for number in range(len(events))]}
    return RunRecord(events=events, **(values | changes))


def page_of(events, **changes):
    return run_page(record_of(events, **changes), NOW)


def words(page):
    """The page's text without its style, script and tags."""
    body = re.sub(r"<(style|script)>.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The small run, read from a folder."""
    return RunReader(store(Storage.open(str(tmp_path_factory.mktemp("runs") / "small")), small_run())).read()


@pytest.fixture(scope="module")
def page(read):
    return run_page(read, NOW)


def test_the_top_says_what_was_asked_and_what_came_out(page):
    said = words(page)
    for part in (
        "resnet50_digits finished",
        "Asked: remove 25% of FLOPs by laasp; torchvision.resnet50 at 3 × 16 × 16, on digits (1,442 training and 355 "
        "test images); schedule of 10 epochs, pruning after 8.",
        "Came out: FLOPs −36.54%; top-1 75.00% (+25.00 points against before pruning).",
        "FLOPs −36.54% 1.30 k → 825 1,300 → 825 multiply-accumulates at one input",
        "Parameters −40.00% 250 → 150",
        "Latency −25.00% 4.00 → 3.00 ms batch 1, CPU, 2 threads, median of 20; 10% to 90%: 2.50 to 4.00 ms",
        "Top-1 75.00% 50.00% before pruning (+25.00 points) 355 test images",
        "Top-5 100.00% 100.00% before pruning (0.00 points)",
        "Time of work 2 min 18 s",
        "Ray, 2 CPUs, 2 trainers; a processor, 2 CPUs, no GPU",
    ):
        assert part in said, part


def test_the_tables_have_decisions_layers_faults_and_what_differs(page):
    said = words(page)
    for part in (
        "1 a l1 1 1.0000 1.2500 23.08% 23.08% 2 5 s",
        "2 b cosine 2 1.0000 1.2500 36.54% 13.46% 2 5 s",
        "a 4 3 75% 4 × 3 × 3 × 3 3 × 3 × 3 × 3 400 300 25.0% l1 1×",
        "b 8 6 75% 8 × 4 × 1 × 1 6 × 3 × 1 × 1 800 450 43.8% cosine 1×",
        "fc 10 10 100% 10 × 8 10 × 6 100 75 25.0% –",
        "part lost and replaced a worker on 10.0.0.7 was lost",
        "All settings are those of the recipe resnet50_digits.",
    ):
        assert part in said, part


def with_latency(*rows):
    events = [LatencyMeasured(rows=rows) if isinstance(event, LatencyMeasured) else event for event in small_run()]
    export = Export(format="onnx", file="model.onnx", max_difference=1e-6, largest_output=2.0, convolutions=2, opset=18)
    return [*events, NetworkExported(export=export)]


def test_every_engine_s_latency_is_there_and_the_exported_file():
    rows = (
        EngineLatency(engine="eager", batch_size=1, unpruned=LATENCY[0], pruned=LATENCY[1]),
        EngineLatency(engine="onnxruntime", batch_size=64, unpruned=LATENCY[1], pruned=LATENCY[1], slower="of memory"),
        EngineLatency(engine="compile", batch_size=1, failed="there is no compiler"),
    )
    said = words(page_of(with_latency(*rows)))
    for part in (
        "Latency −25.00% 4.00 → 3.00 ms",
        "Exported: pruned/model.onnx, opset 18, 2 convolutions as planned; outputs within 1.0e-06 of torch's",
        "Unpruned and pruned by turns on CPU, 2 threads; median, and 10% to 90% in brackets.",
        "eager 1 4.00 (3.50 to 5.00) 3.00 (2.50 to 4.00) 1.33× –",
        "onnxruntime 64 3.00 (2.50 to 4.00) 3.00 (2.50 to 4.00) 1.00× not faster: of memory",
        "compile 1 – – – not measured: there is no compiler",
    ):
        assert part in said, part


def test_a_latency_of_a_busy_machine_is_no_result():
    busy = EngineLatency(
        engine="eager", batch_size=1, unpruned=LATENCY[0], pruned=LATENCY[1], busy=("others used 80% of the cores",)
    )
    said = words(page_of(with_latency(busy)))
    assert "Latency machine too busy 4.00 → 3.00 ms" in said and "−25.00%" not in said
    assert "the machine was too busy for these figures to mean anything: others used 80% of the cores" in said


def test_a_loss_of_the_user_s_own_has_its_own_metrics():
    def own(value):
        return Metrics(loss=0.4, images=355, values={"mIoU": value, "error": 0.25}, better="higher")

    events = [
        dataclasses.replace(event, metrics=own(0.5 if number < 4 else 0.75)) if hasattr(event, "metrics") else event
        for number, event in enumerate(small_run())
    ]
    events = [dataclasses.replace(event, top1=None) if isinstance(event, EpochDone) else event for event in events]
    said = words(page_of(events))
    for part in (
        "FLOPs −36.54%; mIoU 0.7500 (+0.2500 against before pruning).",
        "MIoU 0.7500 0.5000 before pruning (+0.2500) 355 test images",
        "Error 0.2500 0.2500 before pruning (0.0000) 355 test images",
        "MIoU Of the test data.",
    ):
        assert part in said, part
    assert "Top-1" not in said


@pytest.mark.parametrize(
    ("factory", "loss", "asked"),
    [
        ("own:data", "own:bce", "on own:data (1,442 training and 355 test examples); loss: own:bce; schedule"),
        (
            "given",
            "given",
            "on a Python object (1,442 training and 355 test examples); loss: a Python object; schedule",
        ),
        ("", "own:bce", "on digits (1,442 training and 355 test images); loss: own:bce; schedule"),
    ],
)
def test_data_and_loss_of_the_user_s_own_are_named(factory, loss, asked):
    config = started().config
    own = {"data": {**config["data"], "factory": factory}, "train": {**config["train"], "loss": loss}}
    said = words(page_of([started(config=own), *small_run()[1:]]))
    assert asked in said and ("test images" in said) == (not factory)
    noun = "examples" if factory else "images"
    assert f"Of training with augmentation, and of the test {noun}." in said and f"355 test {noun}" in said


def test_layers_come_to_the_multiply_accumulates_of_the_end(read):
    assert sum(layer.macs_now for layer in facts.layers_of(read)) == read.events[-1].macs == 825


def test_curves_run_over_seconds_of_work(read):
    curves = facts.curves_of(read)
    # 60 + 2, 3, 5, 5, 60, 3 seconds
    assert [point.seconds for point in curves.train] == [60.0, 135.0]
    assert [(point.seconds, point.metric) for point in curves.test] == [(62.0, 0.5), (65.0, 0.5), (138.0, 0.75)]
    assert (curves.prunes, curves.faults, curves.seconds) == ([70.0, 75.0], [70.0], 138.0)
    assert curves.spans == [("train", 0.0, 62.0), ("prune", 65.0, 75.0), ("final", 75.0, 135.0)]


def test_seconds_by_part_come_to_all(read):
    assert facts.seconds_by_part(read) == {
        "training: train": 60.0,
        "training: final": 60.0,
        "evaluation": 8.0,
        "iterations: evaluate": 6.0,
        "iterations: apply": 2.0,
        "iterations: other": 2.0,
    }


def test_the_heat_map_has_each_layer_s_least_loss_above_the_iteration_s(read):
    found = facts.loss_map(read)
    assert (found.layers, found.iterations, found.chosen) == (["a", "b"], [1, 2], [(0, 0), (1, 1)])
    assert found.rises == [[0.0, 0.0], [0.75, 0.75]]


def test_losses_that_are_no_numbers_leave_cells_empty():
    events = [started(), pruned(1, "a", {}, {}, 0.1)]
    losses = {1: [("a", "l1", math.nan), ("a", "l2", 2.0), ("b", "l1", math.inf)]}
    found = facts.loss_map(record_of(events, candidates=losses))
    assert found.rises[0] == [0.0] and math.isnan(found.rises[1][0])
    assert facts.loss_map(record_of(events, candidates={1: [("a", "l1", math.nan)]})) is None


def test_settings_that_differ_are_beside_the_recipe_s():
    config = started(prune={"step": 0.02}, config={"name": "mine", "seed": 7}).config
    found = settings_of(config)
    assert found.recipe == "resnet50_digits"
    assert [(one.key, one.value, one.recipe) for one in found.differing] == [
        ("prune.step", "0.02", "0.05"),
        ("seed", "7", "0"),
    ]
    assert settings_of({"name": "x", "model": {"builder": "own:net"}}).recipe == ""


class References(HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.found += [
            value for key, value in attrs if key in ("src", "href", "srcset", "action", "data", "xlink:href")
        ]


def test_nothing_is_fetched_from_elsewhere(page):
    seen = References()
    seen.feed(page)
    assert seen.found and all(value.startswith(("data:", "#")) for value in seen.found)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert seen.tags.isdisjoint({"iframe", "object", "embed"}) and page.count("<script>") == 1


def test_every_id_is_there_once_and_every_reference_leads_to_one(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)


def test_colours_are_the_page_s(page):
    placeholders = re.findall(r"#0[ab]000\w", page)
    assert placeholders == [] and "fill: var(--c1)" in page and "stroke: var(--c3)" in page


def test_texts_of_the_journal_are_escaped():
    evil = "<script>alert('$x$')</script>&\"'"
    events = [
        started(config={"name": "evil", "seed": evil}, filters={evil: 4, "b": 8}, skipped_layers={evil: evil}),
        pruned(1, evil, {evil: 3}, {}, 0.1, decision={"criterion": evil}),
        FaultSurvived(text=evil),
        ImageExcluded(image=evil, reason="cannot be read"),
    ]
    page = page_of(events, name=evil, uri=evil, candidates={1: [(evil, evil, 1.0), ("b", "l1", 2.0)]})
    assert page.count("<script>") == 1 and page.count("</script>") == 1 and "alert(" in words(page)


def test_credentials_of_addresses_are_not_written():
    address = "s3://KEY:SECRET@bucket/runs"
    events = [
        started(config={"storage": address}, macs_by_layer={}, weight_shapes={}),
        FaultSurvived(text=f"{address} was gone"),
        iteration_done(decision=None, text=f"see {address}"),
    ]
    page = page_of(events, uri=address)
    assert "SECRET" not in page and "s3://bucket/runs was gone" in words(page)


def test_what_is_probably_a_credential_among_arguments_is_left_out():
    config = {"data": {"factory": "mine:data", "arguments": {"api_token": "s3cret", "size": 7}}, "name": "run"}
    shown = {row.key: row.value for row in settings_of(config).rows}
    assert (shown["data.arguments.api_token"], shown["data.arguments.size"]) == ("***", "7")


def test_a_run_under_way_says_what_is_not_there_yet():
    said = words(page_of([started()]))
    for part in (
        "under way: last event 2027-01-15 08:00 UTC",
        "So far: FLOPs 0.00% after 0 iterations and 0 epochs.",
        "Nothing has been trained or evaluated yet.",
        "No filters have been removed.",
        "No work is recorded yet.",
        "No prune has been chosen yet.",
        "No layer has lost filters.",
        "No iteration has been made yet.",
        "No worker was lost and no image was left out.",
        "Latency – measured at the run's end",
    ):
        assert part in said, part
    events = small_run()[:4]
    said = words(page_of(events))
    assert "So far: FLOPs −23.08% after 1 iteration and 1 epoch." in said
    assert "FLOPs −21.15% 1.30 k → 1.02 k" not in said
    assert "1,300 → 1,000 multiply-accumulates" in said  # 300 + 600 + 100
    assert "The folder no longer has the candidates' losses" in said


def test_an_older_journal_leaves_out_what_it_lacks():
    events = [run_started(config={"name": "old", "train": {"epochs": 1}, "prune": {"flops_reduction": 0.2}})]
    events += [epoch_done(), pruned(1, "a", {"a": 3}, {}, 0.1)]
    said = words(page_of(events))
    assert "This run's journal has no shapes and FLOPs of layers" in said
    assert "the journal does not say on what" in said
    assert "No recipe has this network and this method" in said


def test_a_run_that_removes_no_filters_has_the_texts_of_its_iterations():
    events = [started(), iteration_done(None)]
    events[1] = IterationDone(iteration=1, seconds={"total": 2.0}, text="stage 1 of 4: 2 of 8 weights are zero")
    said = words(page_of(events))
    assert "1 stage 1 of 4: 2 of 8 weights are zero 2 s" in said and "No candidates were compared." in said


def test_attempts_are_said():
    assert "The run was interrupted and resumed: 3 drivers had it" in words(page_of(small_run(), attempts=3))


def test_a_big_run_s_page_is_below_2_mb(tmp_path):
    events, rankings = big_run(iterations=300, layers=50, criteria=4)
    losses = {
        number: [(entry.layer, entry.criterion, entry.loss) for entry in ranking]
        for number, ranking in rankings.items()
    }
    assert {len(found) for found in losses.values()} == {200}
    page = page_of(events, candidates=losses)
    assert len(page.encode()) < 2_000_000
    assert words(page).count(" 200 5 s ") == 300


def test_reading_again_reads_what_is_new(tmp_path, monkeypatch):
    storage = Storage.open(str(tmp_path / "run"))
    reader = RunReader(storage)
    events = small_run()
    store(storage, events[:4])
    assert len(reader.read().events) == 4
    seen, read = [], Storage.read
    monkeypatch.setattr(Storage, "read", lambda self, name: seen.append(name) or read(self, name))
    store(storage, events[4:])
    again = reader.read()
    assert list(again.events) == events and sorted(again.candidates) == [1, 2]
    assert not any("-start" in name or "000001.parquet" in name for name in seen)


def test_a_damaged_table_of_candidates_is_said_to_be_missing(tmp_path):
    storage = store(Storage.open(str(tmp_path / "run")), small_run())
    storage.write("candidates/000001.parquet", b"no table")
    assert sorted(RunReader(storage).read().candidates) == [2]
    assert "Iterations without stored losses: 1." in words(run_page(RunReader(storage).read(), NOW))


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(StoreError, match="holds no run: give the folder of a run or of a sweep"):
        RunReader(Storage.open(str(tmp_path))).read()


def test_shared_proposals_count_for_each_layer(tmp_path):
    from laasp_ray.records import Candidate, CandidateLoss, MeasuredLoss, Ranking
    from laasp_ray.store.journal import read_candidates

    storage = Storage.open(str(tmp_path))
    shared = Candidate(layer="a", criterion="l1", filters=(0,), flops_reduction=0.1, also=(("b", "l2"),))
    write_candidates(storage, 1, Ranking([CandidateLoss(candidate=shared, measured=MeasuredLoss(1.5, 10))]))
    assert read_candidates(storage, 1) == [("a", "l1", 1.5), ("b", "l2", 1.5)]
