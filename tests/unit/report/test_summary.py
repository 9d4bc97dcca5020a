"""The summary of a journal written by hand."""

import dataclasses

import pytest
from run_events import decision, epoch_done, iteration_done, metrics, phase_done, run_finished, run_started

from laasp_ray.errors import StoreError
from laasp_ray.records import Metrics
from laasp_ray.report.summary import BestEpoch, format_summary, summarise
from laasp_ray.run import events
from laasp_ray.run.events import ImageExcluded, data_of, read_events
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage


def iteration(number, reduction, kept, seconds, **changes):
    chosen = decision(
        iteration=number, layer="layer1.0.conv1", filters=(0,), loss=0.25, loss_before=0.125, flops_reduction=reduction
    )
    spent = {"graph": seconds, "evaluate": 3 * seconds, "total": 5 * seconds}
    return iteration_done(chosen, kept_filters=kept, candidates=10 * number, seconds=spent, **changes)


CONFIG = {"name": "digits", "prune": {"flops_reduction": 0.25}, "train": {"epochs": 200}}
START = run_started(config=CONFIG, macs=1000000, parameters=2000, filters={"layer1.0.conv1": 64, "layer1.0.conv2": 64})
FIRST = [
    START,
    epoch_done(),
    phase_done(metrics=metrics(0.5), seconds=4.0),
    epoch_done(),
    phase_done(metrics=metrics(0.9625), seconds=6.0),
    iteration(1, 0.1, {"layer1.0.conv1": 2}, 1.0),
    ImageExcluded(image="x.jpg", reason="cannot be decoded"),
    phase_done("fine-tune", metrics=metrics(0.75), seconds=2.0),
    iteration(2, 0.26, {"layer1.0.conv1": 1, "layer2.0.conv1": 3}, 2.0),
]
FINISH = run_finished(
    macs=740000,
    parameters=1500,
    flops_reduction=0.26,
    metrics=metrics(0.975, 0.0625),
    best=events.BestEpoch(epoch=186, metrics=metrics(0.98125, 0.09375)),
)
LAST = [phase_done("final", metrics=metrics(0.975, 0.0625), seconds=90.0), FINISH]


def journal(tmp_path, happened):
    """What a reader of a journal that holds these events reads."""
    written = Journal(Storage.open(str(tmp_path)))
    for event in happened:
        written.append(event.NAME, data_of(event))
    return read_events(Journal(Storage.open(str(tmp_path))))


def test_a_finished_run(tmp_path):
    summary = summarise(journal(tmp_path, FIRST + LAST))
    assert summary.finished and summary.name == "digits" and (summary.macs, summary.macs_after) == (1000000, 740000)
    assert (summary.parameters, summary.parameters_after, summary.reached) == (2000, 1500, {"FLOPs": 0.26})
    assert summary.before == Metrics(loss=0.5, top1=0.9625, top5=1.0, images=360)
    assert summary.after == Metrics(loss=0.0625, top1=0.975, top5=1.0, images=360)
    assert [decision.iteration for decision in summary.decisions] == [1, 2] and summary.candidates == 30
    best = Metrics(loss=0.09375, top1=0.98125, top5=1.0, images=360)
    assert summary.best == BestEpoch(epoch=186, epochs=200, metrics=best)
    assert summary.iteration_seconds == {"graph": 1.5, "evaluate": 4.5, "total": 7.5}
    assert summary.phase_seconds == {"train": 10.0, "fine-tune": 2.0, "final": 90.0} and summary.epochs == 2
    assert summary.kept_filters == {"layer1.0.conv1": 1, "layer2.0.conv1": 3}
    assert summary.excluded_images == ("x.jpg",)
    assert format_summary(summary).splitlines() == [
        "Run digits: finished, FLOPs reduction 26.00% of 25.00%",
        "",
        "                before    after",
        "-------------------------------",
        "MACs         1,000,000  740,000",
        "parameters       2,000    1,500",
        "top-1           96.25%   97.50%",
        "top-5          100.00%  100.00%",
        "loss            0.5000   0.0625",
        "test images        360      360",
        "",
        "Iterations: 2, 15 candidates each, 7.50 s each (graph 1.50, evaluate 4.50)",
        "Training: 2 epochs; train 10 s, fine-tune 2 s, final 1 min 30 s",
        "Best tested epoch of the final training: 187 of 200, top-1 98.12%, top-5 100.00%, loss 0.0938 "
        "(the table has the last)",
        "Images left out: x.jpg",
        "",
        "layer           filters kept  of",
        "--------------------------------",
        "layer1.0.conv1             1  64",
        "layer2.0.conv1             3   -",
    ]


def test_without_a_final_training_there_is_no_best_epoch(tmp_path):
    summary = summarise(journal(tmp_path, [*FIRST, dataclasses.replace(FINISH, best=None)]))
    assert summary.finished and summary.best is None
    assert "est tested epoch" not in format_summary(summary)


def test_an_unfinished_run_says_so(tmp_path):
    summary = summarise(journal(tmp_path, FIRST))
    assert not summary.finished and summary.after is summary.best is None and summary.reached == {"FLOPs": 0.26}
    text = format_summary(summary)
    assert "not finished" in text and "MACs         1,000,000      -" in text


def test_a_run_that_has_only_started(tmp_path):
    text = format_summary(summarise(journal(tmp_path, [START])))
    assert "Iterations: none yet" in text and "FLOPs reduction 0.00% of 25.00%" in text


def test_weights_that_were_given_are_the_baseline(tmp_path):
    given = events.BaselineMeasured(metrics=metrics(0.875), loader="dali", seconds=1.0)
    happened = [START, given, phase_done("fine-tune")]
    assert summarise(journal(tmp_path, happened)).before.top1 == 0.875


def test_losses_that_are_not_finite_are_shown(tmp_path):
    given = events.BaselineMeasured(metrics=metrics(0.1, float("nan")), loader="dali", seconds=1.0)
    assert "nan" in format_summary(summarise(journal(tmp_path, [START, given])))


def test_a_journal_that_lacks_something_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"no start event"):
        summarise([])
    journal(tmp_path, [])
    Journal(Storage.open(str(tmp_path))).append("start", {"config": CONFIG, "checkpoint": "initial"})
    with pytest.raises(StoreError, match=r"000001-start\.json in .* is damaged: it lacks 'macs'"):
        read_events(Journal(Storage.open(str(tmp_path))))
    with pytest.raises(StoreError, match=r"lacks something \(KeyError\('train'\)\)"):
        summarise([dataclasses.replace(START, config={"name": "digits"})])


def test_other_targets_are_told_with_what_is_reached_of_them(tmp_path):
    prune = {"flops_reduction": 0.0, "parameters_reduction": 0.2, "latency_reduction": 0.3}
    start = dataclasses.replace(START, config=CONFIG | {"prune": prune})
    reached = {"parameters": 0.15, "latency": 0.25}
    happened = [start, iteration(1, 0.1, {"layer1.0.conv1": 2}, 1.0, reached=reached)]
    summary = summarise(journal(tmp_path, happened))
    assert summary.targets == {"parameters": 0.2, "latency": 0.3}
    assert format_summary(summary).splitlines()[0] == (
        "Run digits: not finished, FLOPs reduction 10.00%, parameters reduction 15.00% of 20.00%, "
        "latency reduction 25.00% of 30.00%"
    )
    assert "Iterations: 1" in format_summary(summary)
    short = summarise(journal(tmp_path / "short", [*happened, events.Exhausted(reason="nothing left")]))
    assert "short of its target, with no filter left to give), FLOPs reduction" in format_summary(short).splitlines()[0]


def test_prunes_that_were_made_up_for_are_counted(tmp_path):
    happened = [
        START,
        *(
            iteration(number, number / 10, {"conv1": 8 - number}, 1.0, details={"compensated": used})
            for number, used in ((1, True), (2, False), (3, True))
        ),
    ]
    text = format_summary(summarise(journal(tmp_path, happened)))
    assert "Compensation: 2 of 3 prunes were made up for; for 1 the loss was lower without" in text
    assert "Compensation" not in format_summary(summarise(journal(tmp_path / "plain", FIRST)))
