"""The progress that the driver shows: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TextIO, cast

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.file_proxy import FileProxy
from rich.markup import escape
from rich.text import Text

from laasp_ray.records import CandidateLoss, Decision, RunState
from laasp_ray.report.durations import format_duration
from laasp_ray.run.events import (
    BaselineMeasured,
    CandidatesMeasured,
    EpochDone,
    Exhausted,
    Happening,
    ImageExcluded,
    IterationDone,
    PhaseStarted,
    RunFinished,
    RunResumed,
    TrainingPhaseDone,
)
from laasp_ray.run.metrics import metrics_text

Clock = Callable[[], float]
_SHARES = ("top1", "top5", "test top1")
_BAR_WIDTH = 32
_REFRESHES_PER_S = 4


def make_progress(
    targets: Mapping[str, float], stream: TextIO | None = None, clock: Clock = time.monotonic
) -> Progress:
    """A live display if `stream` (stderr) is a terminal, else lines. `targets`: quantity -> share to remove.

    `clock` returns seconds, for the remaining time.
    """
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        return LiveProgress(targets, Console(file=stream), clock)
    return LineProgress(targets, stream, clock)


class _TimeLeft(bars.ProgressColumn):
    """When a bar will be full."""

    def render(self, task: bars.Task) -> Text:
        left = _seconds_left(task)
        return Text("" if left is None else f"{format_duration(left)} left", style="progress.remaining")


class _RunView(bars.Progress):
    """Where the run stands: a bar for each target, and one for the epochs or candidates that are under way.

    Shown on `console`, once it is started; without one it only estimates the time that is left.
    """

    def __init__(self, targets: Mapping[str, float], clock: Clock, console: Console | None = None) -> None:
        self.targets = targets
        self.phase, self.detail = "starting", ""
        self.iteration = 0
        self.least: CandidateLoss | None = None
        self.losses: dict[str, float] = {}
        self._comparing = False
        super().__init__(
            "{task.description}",
            bars.BarColumn(_BAR_WIDTH),
            "{task.fields[share]}",
            _TimeLeft(),
            console=console,
            get_time=clock,
            speed_estimate_period=math.inf,  # the mean pace so far: iterations take minutes
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
            disable=console is None,
        )
        self._bars = {
            of: self.add_task(f"{of} reduction", total=target, share=_share(0.0, target))
            for of, target in targets.items()  # none where weights, not filters, are pruned
        }
        self._current = self.add_task("", total=None, visible=False, share="")

    def get_renderables(self) -> Iterable[RenderableType]:
        """What the display shows now."""
        yield Text.assemble((self.phase, "bold cyan"), f"  {self.detail}" if self.detail else "")
        yield self.make_tasks_table(self.tasks)
        yield Text(_joined(_metrics(self.losses), self.least_loss()), style="dim")

    def resume(self, state: RunState) -> None:
        self.iteration = state.iteration
        self._note_reached(state.reached)

    def begin(self, phase: str, detail: str) -> None:
        self.phase, self.detail = phase, detail
        self.losses, self._comparing = {}, False
        self.reset(self._current, visible=False)

    def note_epoch(self, event: EpochDone) -> None:
        self.phase = event.phase
        self.losses = shown_metrics(event)
        self._note_current("epochs", event.position, event.epochs)

    def note_candidates(self, event: CandidatesMeasured) -> None:
        if event.iteration != self.iteration:
            self.iteration, self.least = event.iteration, None
        latest = event.latest
        if latest is not None and math.isfinite(latest.loss) and (self.least is None or latest.loss < self.least.loss):
            self.least = latest
        self._comparing = True
        self._note_current("candidates", event.done, event.total)

    def note_decision(self, decision: Decision, reached: Mapping[str, float]) -> None:
        self.iteration, self.losses = decision.iteration, {"loss": decision.loss}
        self._note_reached(reached)

    def least_loss(self) -> str:
        """The best of the candidates that are being compared; empty where none are."""
        least = self.least if self._comparing else None
        return "" if least is None else f"least loss {least.loss:.4f} ({least.candidate.name})"

    def remaining(self) -> str:
        """For example `target in 3 min 05 s`. Empty while the pace is not known."""
        if self.phase == "prune":
            waits = [_seconds_left(self._task(bar)) for bar in self._bars.values()]
            what = "target in" if len(waits) < 2 else "targets in"
        else:
            what, waits = f"{self.phase} done in", [_seconds_left(self._task(self._current))]
        known = [seconds for seconds in waits if seconds is not None]
        return f"{what} {format_duration(max(known))}" if waits and len(known) == len(waits) else ""

    def _note_reached(self, reached: Mapping[str, float]) -> None:
        for of, bar in self._bars.items():
            if reached[of] < self._task(bar).completed:  # a clock's figure may fall: there is no pace to go by
                self.reset(bar)
            self.update(bar, completed=reached[of], share=_share(reached[of], self.targets[of]))

    def _note_current(self, what: str, done: int, total: int) -> None:
        self.update(
            self._current, description=what, completed=done, total=total, share=f"{done} of {total}", visible=True
        )

    def _task(self, bar: bars.TaskID) -> bars.Task:
        return next(task for task in self.tasks if task.id == bar)


class Progress(ABC):
    """An observer that shows a run. Subclasses decide how it looks. Shares are from 0 to 1."""

    def __init__(self, targets: Mapping[str, float], clock: Clock, console: Console | None = None) -> None:
        """`console` is where bars are shown, if they are."""
        self._view, self._targets = _RunView(targets, clock, console), targets
        self._loader_shown = False

    def on_event(self, event: Happening, state: RunState) -> None:
        """Shows the event."""
        match event:
            case RunResumed():
                self._view.resume(state)
                self._show_resumed(resumed_line(state, self._targets))
            case PhaseStarted():
                self._show_phase(event)
            case CandidatesMeasured():
                self._view.note_candidates(event)
                self._show_candidates(event)
            case EpochDone():
                self._view.note_epoch(event)
                self._show_epoch(epoch_line(event))
            case IterationDone() if event.decision is not None:
                self._view.note_decision(event.decision, state.reached)
                self._show_decision(decision_line(event, state.reached, self._targets))
            case RunFinished():
                self._show_finished(event.text)
            case _:
                for text in self._notes(event, state):
                    self._show_note(text)

    @abstractmethod
    def close(self) -> None:
        """Releases the terminal. It may be called twice."""

    def _notes(self, event: Happening, state: RunState) -> Iterator[str]:
        match event:
            case ImageExcluded():
                yield f"left out from now on, cannot be read or decoded: {event.image}"
            case IterationDone():
                yield event.text
            case Exhausted():
                reached = ", ".join(f"{of} {-state.reached[of]:+.2%} of {t:.2%}" for of, t in self._targets.items())
                yield f"pruning ends short of its targets ({reached}): {event.reason}"
            case TrainingPhaseDone() | BaselineMeasured():
                if not self._loader_shown:  # the trainers' own log does not reach the driver
                    yield f"the trainers' data are read by {event.loader}"
                self._loader_shown = True
                metrics = event.metrics
                yield (
                    f"after {event.phase if isinstance(event, TrainingPhaseDone) else 'baseline'}: test "
                    f"{metrics_text(metrics)} on {metrics.images:,} examples"
                )

    @abstractmethod
    def _show_resumed(self, line: str) -> None: ...

    @abstractmethod
    def _show_phase(self, event: PhaseStarted) -> None: ...

    @abstractmethod
    def _show_candidates(self, event: CandidatesMeasured) -> None: ...

    @abstractmethod
    def _show_epoch(self, line: str) -> None: ...

    @abstractmethod
    def _show_decision(self, line: str) -> None: ...

    @abstractmethod
    def _show_note(self, text: str) -> None: ...

    @abstractmethod
    def _show_finished(self, text: str) -> None: ...


class LineProgress(Progress):
    """One line per epoch, iteration and decision, for logs and pipes."""

    def __init__(self, targets: Mapping[str, float], stream: TextIO, clock: Clock) -> None:
        super().__init__(targets, clock)
        self._stream = stream

    def close(self) -> None:
        self._stream.flush()

    def _show_resumed(self, line: str) -> None:
        self._print(line)

    def _show_phase(self, event: PhaseStarted) -> None:
        if event.phase != self._view.phase or event.phase != "prune":
            self._print(f"{event.phase}: {event.detail}")
        self._view.begin(event.phase, event.detail)

    def _show_candidates(self, event: CandidatesMeasured) -> None:
        if event.done == event.total:
            line = f"iteration {event.iteration}: {event.total} candidates measured"
            self._print(_joined(line, self._view.least_loss()))

    def _show_epoch(self, line: str) -> None:
        self._print(_joined(line, self._view.remaining()))

    def _show_decision(self, line: str) -> None:
        self._print(_joined(line, self._view.remaining()))

    def _show_note(self, text: str) -> None:
        self._print(f"note: {text}")

    def _show_finished(self, text: str) -> None:
        self._print(text)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class LiveProgress(Progress):
    """One display at the bottom of the terminal. Epochs, decisions and notes scroll above it."""

    def __init__(self, targets: Mapping[str, float], console: Console, clock: Clock) -> None:
        super().__init__(targets, clock, console)
        self._console = console
        self._above = cast(TextIO, FileProxy(console, console.file))
        self._diverted: list[logging.StreamHandler] = []

    def close(self) -> None:
        if self._view.live.is_started:
            self._view.stop()
        while self._diverted:
            self._diverted.pop().setStream(self._console.file)

    def _show_resumed(self, line: str) -> None:
        self._print(f"[bold yellow]{escape(line)}[/]")

    def _show_phase(self, event: PhaseStarted) -> None:
        self._view.begin(event.phase, event.detail)
        self._show()

    def _show_candidates(self, event: CandidatesMeasured) -> None:
        self._show()

    def _show_epoch(self, line: str) -> None:
        self._print(f"[dim]{escape(line)}[/]")

    def _show_decision(self, line: str) -> None:
        self._print(escape(line))

    def _show_note(self, text: str) -> None:
        self._print(f"[yellow]note:[/] {escape(text)}")

    def _show_finished(self, text: str) -> None:
        self._print(f"[bold green]{escape(text)}[/]")

    def _show(self) -> None:
        if not self._view.live.is_started:
            self._view.start()
            self._divert_logs()

    def _divert_logs(self) -> None:
        """Redirects log handlers from the terminal to the console, which prints above the display; else they would
        break it.
        """
        loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
        for handler in (handler for logger in loggers for handler in getattr(logger, "handlers", ())):
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._console.file:
                handler.setStream(self._above)
                self._diverted.append(handler)

    def _print(self, markup: str) -> None:
        self._show()
        self._console.print(markup, highlight=False, soft_wrap=True)
        self._view.refresh()


def resumed_line(state: RunState, targets: Mapping[str, float]) -> str:
    """The line that says where a resumed run continues."""
    iteration = state.iteration + (state.phase == "prune")
    before = "going on before the first iteration" if state.phase == "train" else "going on"  # nothing will be pruned
    return _joined(
        f"going on at iteration {iteration}" if iteration else before,
        *(f"{state.reached[of]:.1%} of {target:.1%} {of} gone" for of, target in targets.items()),
        f"{state.epochs_trained} epochs trained",
    )


def shown_metrics(event: EpochDone) -> dict[str, float]:
    """Loss and top1 in training, and `test top1` where the test images were evaluated; with a loss of the user's own
    the primary metric instead of top1, in tests only.
    """
    shown = {"loss": event.loss} if event.top1 is None else {"loss": event.loss, "top1": event.top1}
    if event.metrics is not None:
        name, value = event.metrics.primary
        shown[f"test {name}"] = value
    return shown


def epoch_line(event: EpochDone) -> str:
    """The line for an epoch."""
    return _joined(
        f"{event.phase}: epoch {event.position} of {event.epochs}",
        _metrics(shown_metrics(event)),
        f"learning rate {event.learning_rate:g}",
    )


def decision_line(event: IterationDone, reached: Mapping[str, float], targets: Mapping[str, float]) -> str:
    """The line for an iteration's decision: layers, criteria, filters, losses, FLOPs, other targets, seconds."""
    decision = event.decision
    assert decision is not None
    count = sum(len(prune.filters) for prune in decision.prunes)
    filters = f"{count} filter" + ("s" if count != 1 else "")
    gone = {of: share for of, share in reached.items() if of == "FLOPs" or of in targets}
    shares = [f"{of} {-share:+.2%}" + (f" of {targets[of]:.2%}" if of in targets else "") for of, share in gone.items()]
    return (
        f"iteration {decision.iteration}: {_layers(decision)}, {filters}, "
        f"loss {decision.loss_before:.4f} -> {decision.loss:.4f}, {', '.join(shares)}, "
        f"{format_duration(event.seconds['total'])}"
    )


def _layers(decision: Decision) -> str:
    """Each layer with its criterion. Of many layers with the same criterion only the first is named."""
    if len({prune.criterion for prune in decision.prunes}) > 1:
        return " and ".join(f"{prune.layer} by {prune.criterion}" for prune in decision.prunes)
    more = f" and {len(decision.further)} more" if decision.further else ""
    return f"{decision.layer}{more} by {decision.criterion}"


def _metrics(metrics: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.2%}" if name in _SHARES else f"{name} {value:.4f}" for name, value in metrics.items()
    )


def _share(reached: float, target: float) -> str:
    return f"{reached:.2%} of {target:.2%}"


def _seconds_left(task: bars.Task) -> float | None:
    """Seconds until the bar is full, at the mean pace so far; None until it has grown twice."""
    return max(0.0, task.remaining / task.speed) if task.speed else None


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
