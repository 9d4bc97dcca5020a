"""What is shown, word for word, on a terminal and elsewhere."""

import dataclasses
import io
import logging
import sys

import pytest
from rich.console import Console
from run_events import epoch_done, iteration_done, metrics, run_finished

from laasp_ray.records import Candidate, CandidateLoss, Decision, LayerPrune, MeasuredLoss, RunState
from laasp_ray.report.progress import LineProgress, LiveProgress, decision_line, make_progress, resumed_line
from laasp_ray.run.events import CandidatesMeasured, IterationDone, PhaseStarted, RunResumed


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def decision(iteration, reduction, filters=(1, 4)):
    return Decision(
        iteration=iteration,
        layer="layer3.0.conv1",
        criterion="cosine",
        filters=filters,
        loss=0.25,
        loss_before=0.125,
        flops_reduction=reduction,
    )


def gone(flops, parameters=0.0, latency=0.0):
    return {"FLOPs": flops, "parameters": parameters, "latency": latency}


def displayed(progress):
    """The lines of the display."""
    with progress._console.capture() as capture:
        progress._console.print(progress._view.get_renderable())
    return [line.rstrip() for line in capture.get().splitlines()]


FLOPS = {"FLOPs": 0.25}
HALF = {"FLOPs": 0.5}


def loss(value, layer="a"):
    candidate = Candidate(layer=layer, criterion="l1", filters=(0, 1), flops_reduction=0.1)
    return CandidateLoss(candidate=candidate, measured=MeasuredLoss(value, 10))


def phase(progress, name, detail):
    progress.on_event(PhaseStarted(phase=name, detail=detail), RunState())


def train(progress, phase, position, epochs, shown, learning_rate):
    """An epoch; `shown` has its loss, and top1 and that of the test images if they are there."""
    tested = metrics(shown["test top1"]) if "test top1" in shown else None
    event = epoch_done(
        phase=phase,
        position=position,
        epochs=epochs,
        loss=shown["loss"],
        top1=shown.get("top1", 0.0),
        metrics=tested,
        learning_rate=learning_rate,
    )
    progress.on_event(event, RunState())


def measure(progress, done, total, latest, iteration):
    progress.on_event(CandidatesMeasured(iteration=iteration, done=done, total=total, latest=latest), RunState())


def decide(progress, chosen, reached, seconds):
    state = RunState(**{f"{of.lower()}_reduction": share for of, share in reached.items()})
    progress.on_event(iteration_done(chosen, seconds={"total": seconds}), state)


def note(progress, text):
    """What a method says of an iteration without a decision."""
    progress.on_event(IterationDone(iteration=1, seconds={"total": 1.0}, text=text), RunState())


def finish(progress, text):
    progress.on_event(run_finished(text=text), RunState())


def resume(progress, state):
    progress.on_event(RunResumed(), state)


def tell(progress, clock):
    """A short run: two epochs, an iteration, a fine-tuning, an iteration."""
    phase(progress, "train", "2 epochs")
    clock.now = 10
    train(progress, "train", 1, 2, {"loss": 2.0, "top1": 0.5, "test top1": 0.625}, 0.1)
    clock.now = 30
    train(progress, "train", 2, 2, {"loss": 1.5, "top1": 0.755}, 0.01)
    phase(progress, "prune", "iteration 1")
    for done, value in ((1, 3.0), (2, float("nan")), (3, 2.0), (4, 4.0)):
        measure(progress, done, 4, loss(value, layer="abcd"[done - 1]), 1)
    clock.now = 40
    decide(progress, decision(1, 0.05), gone(0.05), 10.0)
    phase(progress, "fine-tune", "1 epochs")
    note(progress, "left out: x.jpg")
    phase(progress, "prune", "iteration 2")
    measure(progress, 1, 2, loss(5.0), 2)
    measure(progress, 2, 2, None, 2)
    clock.now = 100
    decide(progress, decision(2, 0.1, (7,)), gone(0.1), 65.0)


def test_lines_where_there_is_no_terminal(clock):
    stream = io.StringIO()
    progress = make_progress(FLOPS, stream, clock)
    assert isinstance(progress, LineProgress)
    tell(progress, clock)
    finish(progress, "done")
    progress.close()
    assert stream.getvalue().splitlines() == [
        "train: 2 epochs",
        "train: epoch 1 of 2, loss 2.0000, top1 50.00%, test top1 62.50%, learning rate 0.1",
        "train: epoch 2 of 2, loss 1.5000, top1 75.50%, learning rate 0.01, train done in 0 s",
        "prune: iteration 1",
        "iteration 1: 4 candidates measured, least loss 2.0000 (c by l1 (2 filters))",
        "iteration 1: layer3.0.conv1 by cosine, 2 filters, loss 0.1250 -> 0.2500, FLOPs -5.00% of 25.00%, 10 s",
        "fine-tune: 1 epochs",
        "note: left out: x.jpg",
        "prune: iteration 2",
        "iteration 2: 2 candidates measured, least loss 5.0000 (a by l1 (2 filters))",
        # 5% took 60 s, so the 15% that are left take 180 s
        "iteration 2: layer3.0.conv1 by cosine, 1 filter, loss 0.1250 -> 0.2500, FLOPs -10.00% of 25.00%, 1 min 05 s, "
        "target in 3 min 00 s",
        "done",
    ]


def cut_off(phase, iteration, reduction, epochs):
    return RunState(phase=phase, iteration=iteration, flops_reduction=reduction, epochs_trained=epochs)


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (cut_off("prune", 11, 0.3139, 9), "going on at iteration 12, 31.4% of 53.8% FLOPs gone, 9 epochs trained"),
        (cut_off("fine-tune", 12, 0.335, 9), "going on at iteration 12, 33.5% of 53.8% FLOPs gone, 9 epochs trained"),
        (
            cut_off("train", 0, 0.0, 3),
            "going on before the first iteration, 0.0% of 53.8% FLOPs gone, 3 epochs trained",
        ),
    ],
)
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_run_that_goes_on_says_where(clock, stream, state, line):
    shown = stream()
    progress = make_progress({"FLOPs": 0.538}, shown, clock)
    resume(progress, state)
    progress.close()
    assert line in shown.getvalue()


def test_a_run_that_prunes_nothing_has_no_first_iteration():
    assert resumed_line(cut_off("final", 0, 0.0, 3), {}) == "going on, 3 epochs trained"


def test_what_was_reached_before_counts_for_the_display_and_the_remaining_time(clock):
    progress = LiveProgress(HALF, Console(file=io.StringIO(), width=100), clock)
    try:
        resume(progress, cut_off("prune", 11, 0.3, 9))
        assert displayed(progress)[1] == f"FLOPs reduction {'━' * 19}{' ' * 13} 30.00% of 50.00%"  # 38 halves of 64
        clock.now = 60
        phase(progress, "prune", "iteration 12")
        decide(progress, decision(12, 0.4), gone(0.4), 60.0)
        assert progress._view.remaining() == "target in 1 min 00 s"
    finally:
        progress.close()


def test_log_records_go_above_the_live_display_and_where_they_went_before_after_it(clock):
    stream, elsewhere = Terminal(), io.StringIO()
    logger = logging.Logger("some.library")
    handlers = [logging.StreamHandler(stream), logging.StreamHandler(elsewhere)]
    for handler in handlers:
        logger.addHandler(handler)
    logging.root.manager.loggerDict["some.library"] = logger
    try:
        progress = make_progress(FLOPS, stream, clock)
        phase(progress, "prune", "iteration 1")
        note(progress, "drawn")
        before = len(stream.getvalue())
        logger.warning("a record [sic]")
        written = stream.getvalue()[before:]
        progress.close()
        # The display is wiped first, and drawn again below the record.
        assert written.index("\x1b[2K") < written.index("a record [sic]") < written.index("FLOPs reduction")
        assert handlers[0].stream is stream
        assert handlers[1].stream is elsewhere and elsewhere.getvalue() == "a record [sic]\n"
    finally:
        del logging.root.manager.loggerDict["some.library"]


def test_iterations_that_follow_each_other_are_announced_once(clock):
    stream = io.StringIO()
    progress = LineProgress(FLOPS, stream, clock)
    for iteration in (1, 2, 3):
        phase(progress, "prune", f"iteration {iteration}")
    assert stream.getvalue() == "prune: iteration 1\n"


def test_remaining_time_of_a_training_phase_is_by_epochs_and_starts_anew_with_each_training_phase(clock):
    stream = io.StringIO()
    progress = LineProgress(FLOPS, stream, clock)
    phase(progress, "final", "4 epochs")
    for epoch in (1, 2):
        clock.now += 60
        train(progress, "final", epoch, 4, {"loss": 1.0}, 0.1)
    phase(progress, "fine-tune", "2 epochs")
    train(progress, "fine-tune", 1, 2, {"loss": 1.0}, 0.1)
    lines = stream.getvalue().splitlines()
    assert lines[2].endswith("final done in 2 min 00 s") and lines[4].endswith("learning rate 0.1")


def test_a_terminal_gets_a_live_display_with_lines_above(clock):
    stream = Terminal()
    progress = make_progress(FLOPS, stream, clock)
    assert isinstance(progress, LiveProgress)
    tell(progress, clock)
    finish(progress, "done [sic]")
    progress.close()
    progress.close()
    shown = stream.getvalue()
    assert shown.index("epoch 1 of 2") < shown.index("iteration 1: layer3.0.conv1") < shown.index("done [sic]")
    assert "\x1b[?25l" in shown and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor comes back


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_terminal_clean(clock, monkeypatch, error):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    progress = make_progress(FLOPS, clock=clock)
    with pytest.raises(error):
        try:
            tell(progress, clock)
            raise error
        finally:
            progress.close()
    assert sys.stderr is stream and not progress._view.live.is_started
    drawn, _, wiped = stream.getvalue().rpartition("FLOPs reduction")
    assert drawn and wiped.endswith("\x1b[2K") and wiped.count("\x1b[2K") == 4  # lines: the phase, two bars, the facts
    print("Traceback", file=sys.stderr)
    assert stream.getvalue().endswith("\x1b[2KTraceback\n")


def test_what_the_display_holds(clock):
    console = Console(file=io.StringIO(), width=100)
    progress = LiveProgress(FLOPS, console, clock)
    try:
        tell(progress, clock)
        phase(progress, "prune", "iteration 3")
        measure(progress, 30, 40, loss(0.5, "x"), 3)
        assert displayed(progress) == [
            "prune  iteration 3",
            f"FLOPs reduction {'━' * 12}╸{' ' * 19} 10.00% of 25.00% 3 min 00 s left",
            f"candidates      {'━' * 24}{' ' * 8} 30 of 40",
            "least loss 0.5000 (x by l1 (2 filters))",
        ]
        clock.now = 110
        measure(progress, 35, 40, loss(0.75, "y"), 3)  # 5 took 10 s
        assert displayed(progress)[2] == f"candidates      {'━' * 28}{' ' * 4} 35 of 40         10 s left"
        phase(progress, "fine-tune", "4 epochs")
        assert displayed(progress) == [
            "fine-tune  4 epochs",
            f"FLOPs reduction {'━' * 12}╸{' ' * 19} 10.00% of 25.00% 3 min 00 s left",
            "",
        ]
        for epoch in (1, 2):
            clock.now += 20
            train(progress, "fine-tune", epoch, 4, {"loss": 1.0 / epoch, "top1": 0.5}, 0.1)
        assert displayed(progress)[2:] == [
            f"epochs          {'━' * 16}{' ' * 16} 2 of 4           40 s left",
            "loss 0.5000, top1 50.00%",
        ]
    finally:
        progress.close()


def further(criterion):
    return (
        LayerPrune(layer="b", criterion="pls", filters=(0, 1, 2)),
        LayerPrune(layer="c", criterion=criterion, filters=(7,)),
    )


def test_a_decision_of_several_layers_counts_them_and_their_filters():
    joint = dataclasses.replace(decision(2, 0.1), criterion="pls", further=further("pls"))
    assert decision_line(iteration_done(joint, seconds={"total": 5.0}), gone(0.1), FLOPS) == (
        "iteration 2: layer3.0.conv1 and 2 more by pls, 6 filters, loss 0.1250 -> 0.2500, FLOPs -10.00% of 25.00%, 5 s"
    )


def test_prunes_by_several_criteria_are_named_with_theirs():
    joint = dataclasses.replace(decision(2, 0.1), further=further("l1"))
    assert decision_line(iteration_done(joint, seconds={"total": 5.0}), gone(0.1), FLOPS) == (
        "iteration 2: layer3.0.conv1 by cosine and b by pls and c by l1, 6 filters, loss 0.1250 -> 0.2500, "
        "FLOPs -10.00% of 25.00%, 5 s"
    )


def test_every_target_is_shown_that_is_given_and_flops_always(clock):
    other = {"parameters": 0.4, "latency": 0.2}
    line = decision_line(iteration_done(decision(2, 0.1), seconds={"total": 5.0}), gone(0.1, 0.3, -0.05), other)
    assert line.endswith("FLOPs -10.00%, parameters -30.00% of 40.00%, latency +5.00% of 20.00%, 5 s")
    state = RunState(phase="prune", iteration=1, flops_reduction=0.1, parameters_reduction=0.3, latency_reduction=0.05)
    assert resumed_line(state, other) == (
        "going on at iteration 2, 30.0% of 40.0% parameters gone, 5.0% of 20.0% latency gone, 0 epochs trained"
    )
    console = Console(file=io.StringIO(), width=100)
    progress = LiveProgress(other, console, clock)
    try:
        decide(progress, decision(2, 0.1), gone(0.1, 0.3, -0.05), 5.0)
        lines = displayed(progress)
    finally:
        progress.close()
    assert lines[1] == f"parameters reduction {'━' * 23}╸{' ' * 8} 30.00% of 40.00%"
    assert lines[2] == f"latency reduction    {' ' * 32} -5.00% of 20.00%"


def test_the_remaining_time_is_that_of_the_target_that_is_furthest(clock):
    targets = {"FLOPs": 0.25, "parameters": 0.25}
    stream = io.StringIO()
    progress = LineProgress(targets, stream, clock)
    phase(progress, "prune", "iteration 1")
    decide(progress, decision(1, 0.05), gone(0.05, 0.1), 5.0)
    assert "targets in" not in stream.getvalue()
    clock.now = 60
    # FLOPs: 5% took 60 s, 15% are left. Parameters: 10% took 60 s, 5% are left.
    decide(progress, decision(2, 0.1), gone(0.1, 0.2), 60.0)
    assert stream.getvalue().endswith(", targets in 3 min 00 s\n")
    clock.now = 120
    # A clock's figure may fall below where it began: then there is no telling.
    decide(progress, decision(3, 0.15), gone(0.15, 0.1), 60.0)
    assert stream.getvalue().endswith("1 min 00 s\n") and stream.getvalue().count("targets in") == 1
