"""What a person follows in the driver: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from laasp_ray.records import CandidateLoss, Decision, RunState
from laasp_ray.report.eta import EtaEstimator, format_duration

Clock = Callable[[], float]
_SHARES = ("top1", "top5", "test top1")
_BAR_WIDTH = 32
_REFRESHES_PER_S = 4


class Progress(Protocol):
    """What the controller tells as it goes. Shares are from 0 to 1.

    `targets` and `reached` have the share of the unpruned network's that is to go, and is gone, by what a target may be
    of (config.TARGETS); `reached` has all, `targets` those that are given.
    """

    def resumed(self, state: RunState, targets: Mapping[str, float]) -> None:
        """A run that was cut off goes on from `state`."""

    def phase(self, name: str, detail: str) -> None:
        """A training phase, an iteration, or something else begins."""

    def epoch(self, phase: str, epoch: int, epochs: int, metrics: Mapping[str, float], learning_rate: float) -> None:
        """`epoch` of the `epochs` of this training phase are finished; `metrics` are loss and top1 in training, and
        `test top1` where the test images were evaluated."""

    def candidates(self, done: int, total: int, measured: CandidateLoss | None, iteration: int) -> None:
        """`done` of an iteration's `total` candidates have their loss, of which `measured` is the latest or the
        best."""

    def decision(
        self, decision: Decision, reached: Mapping[str, float], targets: Mapping[str, float], seconds: float
    ) -> None:
        """An iteration is over; it took `seconds`."""

    def note(self, text: str) -> None:
        """Something worth knowing, such as an image that was left out."""

    def finished(self, text: str) -> None: ...

    def close(self) -> None:
        """Gives the terminal back; may be called twice."""


def make_progress(
    targets: Mapping[str, float], stream: TextIO | None = None, clock: Clock = time.monotonic
) -> Progress:
    """A live display if `stream` (stderr) is a terminal, else lines. `targets`: the shares to be gone, by what of.

    `clock` gives seconds, for the remaining time.
    """
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        return LiveProgress(targets, Console(file=stream), clock)
    return LineProgress(targets, stream, clock)


class _RunView:
    """Where the run stands, and when it will have come to the end of what it is doing."""

    def __init__(self, targets: Mapping[str, float], clock: Clock) -> None:
        self.targets = targets
        self.phase, self.detail = "starting", ""
        self.iteration = 0
        self.reached = dict.fromkeys(targets, 0.0)
        self.epoch, self.epochs = 0, 0
        self.done, self.total = 0, 0
        self.least: CandidateLoss | None = None
        self.losses: dict[str, float] = {}
        self._clock = clock
        self._paces = {of: EtaEstimator(clock) for of in targets}
        self._epoch_pace = EtaEstimator(clock)

    def resume(self, state: RunState) -> None:
        self.iteration = state.iteration
        self._note_reached(state.reached)

    def begin(self, phase: str, detail: str) -> None:
        self.phase, self.detail = phase, detail
        self.epoch = self.epochs = self.done = self.total = 0
        self.losses = {}
        self._epoch_pace = EtaEstimator(self._clock)

    def note_epoch(self, phase: str, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        self.phase, self.epoch, self.epochs, self.losses = phase, epoch, epochs, dict(metrics)
        self._epoch_pace.update(epoch)

    def note_candidate(self, done: int, total: int, measured: CandidateLoss | None, iteration: int) -> None:
        if iteration != self.iteration:
            self.iteration, self.least = iteration, None
        self.done, self.total = done, total
        if (
            measured is not None
            and math.isfinite(measured.loss)
            and (self.least is None or measured.loss < self.least.loss)
        ):
            self.least = measured

    def note_decision(self, decision: Decision, reached: Mapping[str, float]) -> None:
        self.iteration, self.losses = decision.iteration, {"loss": decision.loss}
        self._note_reached(reached)

    def _note_reached(self, reached: Mapping[str, float]) -> None:
        for of, pace in self._paces.items():
            self.reached[of] = reached[of]
            pace.update(reached[of])

    def remaining(self) -> str:
        """For example `target in 3 min 05 s`; empty as long as there is no pace to tell it from."""
        if self.phase == "prune":
            waits = [pace.seconds_until(self.targets[of]) for of, pace in self._paces.items()]
            what = "target in" if len(waits) < 2 else "targets in"
        else:
            what, waits = f"{self.phase} done in", [self._epoch_pace.seconds_until(self.epochs)]
        known = [seconds for seconds in waits if seconds is not None]
        return f"{what} {format_duration(max(known))}" if waits and len(known) == len(waits) else ""


class LineProgress:
    """A line per epoch, iteration and decision; for logs and pipes."""

    def __init__(self, targets: Mapping[str, float], stream: TextIO, clock: Clock) -> None:
        self._standing, self._stream = _RunView(targets, clock), stream

    def resumed(self, state: RunState, targets: Mapping[str, float]) -> None:
        self._standing.resume(state)
        self._print(resumed_line(state, targets))

    def phase(self, name: str, detail: str) -> None:
        if name != self._standing.phase or name != "prune":
            self._print(f"{name}: {detail}")
        self._standing.begin(name, detail)

    def epoch(self, phase: str, epoch: int, epochs: int, metrics: Mapping[str, float], learning_rate: float) -> None:
        self._standing.note_epoch(phase, epoch, epochs, metrics)
        self._print(_joined(epoch_line(phase, epoch, epochs, metrics, learning_rate), self._standing.remaining()))

    def candidates(self, done: int, total: int, measured: CandidateLoss | None, iteration: int) -> None:
        self._standing.note_candidate(done, total, measured, iteration)
        if done == total:
            self._print(f"iteration {iteration}: {total} candidates measured{_least(self._standing)}")

    def decision(
        self, decision: Decision, reached: Mapping[str, float], targets: Mapping[str, float], seconds: float
    ) -> None:
        self._standing.note_decision(decision, reached)
        self._print(_joined(decision_line(decision, reached, targets, seconds), self._standing.remaining()))

    def note(self, text: str) -> None:
        self._print(f"note: {text}")

    def finished(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        self._stream.flush()

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class LiveProgress:
    """One display at the foot of the terminal; epochs, decisions and notes scroll by above it."""

    def __init__(self, targets: Mapping[str, float], console: Console, clock: Clock) -> None:
        self._standing, self._console = _RunView(targets, clock), console
        self._live = Live(
            get_renderable=self.render, console=console, refresh_per_second=_REFRESHES_PER_S, transient=True
        )
        self._above = cast(TextIO, FileProxy(console, console.file))
        self._diverted: list[logging.StreamHandler] = []

    def render(self) -> RenderableType:
        """What the display shows now."""
        standing = self._standing
        bars = Table.grid(padding=(0, 2))
        for of, target in standing.targets.items():  # none where weights, not filters, are pruned
            reached = standing.reached[of]
            bars.add_row(f"{of} reduction", _bar(reached, target), f"{reached:.2%} of {target:.2%}")
        if standing.epochs:
            bars.add_row("epochs", _bar(standing.epoch, standing.epochs), f"{standing.epoch} of {standing.epochs}")
        elif standing.total:
            bars.add_row("candidates", _bar(standing.done, standing.total), f"{standing.done} of {standing.total}")
        title = Text.assemble((standing.phase, "bold cyan"), f"  {standing.detail}" if standing.detail else "")
        facts = _joined(_metrics(standing.losses), _least(standing).removeprefix(", "), standing.remaining())
        return Group(title, bars, Text(facts, style="dim"))

    def resumed(self, state: RunState, targets: Mapping[str, float]) -> None:
        self._standing.resume(state)
        self._print(f"[bold yellow]{escape(resumed_line(state, targets))}[/]")

    def phase(self, name: str, detail: str) -> None:
        self._standing.begin(name, detail)
        self._show()

    def epoch(self, phase: str, epoch: int, epochs: int, metrics: Mapping[str, float], learning_rate: float) -> None:
        self._standing.note_epoch(phase, epoch, epochs, metrics)
        self._print(f"[dim]{escape(epoch_line(phase, epoch, epochs, metrics, learning_rate))}[/]")

    def candidates(self, done: int, total: int, measured: CandidateLoss | None, iteration: int) -> None:
        self._standing.note_candidate(done, total, measured, iteration)
        self._show()

    def decision(
        self, decision: Decision, reached: Mapping[str, float], targets: Mapping[str, float], seconds: float
    ) -> None:
        self._standing.note_decision(decision, reached)
        self._print(escape(decision_line(decision, reached, targets, seconds)))

    def note(self, text: str) -> None:
        self._print(f"[yellow]note:[/] {escape(text)}")

    def finished(self, text: str) -> None:
        self._print(f"[bold green]{escape(text)}[/]")

    def close(self) -> None:
        self._live.stop()
        while self._diverted:
            self._diverted.pop().setStream(self._console.file)

    def _show(self) -> None:
        if not self._live.is_started:
            self._live.start()
            self._divert_logs()

    def _divert_logs(self) -> None:
        """Handlers that write to the terminal would tear the display: they write to what puts lines above it."""
        loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
        for handler in (handler for logger in loggers for handler in getattr(logger, "handlers", ())):
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._console.file:
                handler.setStream(self._above)
                self._diverted.append(handler)

    def _print(self, markup: str) -> None:
        self._show()
        self._console.print(markup, highlight=False, soft_wrap=True)
        self._live.refresh()


def resumed_line(state: RunState, targets: Mapping[str, float]) -> str:
    """The line that tells where a run goes on."""
    iteration = state.iteration + (state.phase == "prune")
    before = "going on before the first iteration" if state.phase == "train" else "going on"  # nothing will be pruned
    return _joined(
        f"going on at iteration {iteration}" if iteration else before,
        *(f"{state.reached[of]:.1%} of {target:.1%} {of} gone" for of, target in targets.items()),
        f"{state.epochs_trained} epochs trained",
    )


def epoch_line(phase: str, epoch: int, epochs: int, metrics: Mapping[str, float], learning_rate: float) -> str:
    return _joined(f"{phase}: epoch {epoch} of {epochs}", _metrics(metrics), f"learning rate {learning_rate:g}")


def decision_line(
    decision: Decision, reached: Mapping[str, float], targets: Mapping[str, float], seconds: float
) -> str:
    """The line that tells an iteration: layers, criteria, filters, losses, FLOPs and other targets, seconds."""
    count = sum(len(prune.filters) for prune in decision.prunes)
    filters = f"{count} filter" + ("s" if count != 1 else "")
    gone = {of: share for of, share in reached.items() if of == "FLOPs" or of in targets}
    shares = [f"{of} {-share:+.2%}" + (f" of {targets[of]:.2%}" if of in targets else "") for of, share in gone.items()]
    return (
        f"iteration {decision.iteration}: {_layers(decision)}, {filters}, "
        f"loss {decision.loss_before:.4f} -> {decision.loss:.4f}, {', '.join(shares)}, {format_duration(seconds)}"
    )


def _layers(decision: Decision) -> str:
    """Each layer with its criterion; of many by one criterion the first."""
    if len({prune.criterion for prune in decision.prunes}) > 1:
        return " and ".join(f"{prune.layer} by {prune.criterion}" for prune in decision.prunes)
    more = f" and {len(decision.further)} more" if decision.further else ""
    return f"{decision.layer}{more} by {decision.criterion}"


def _metrics(metrics: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.2%}" if name in _SHARES else f"{name} {value:.4f}" for name, value in metrics.items()
    )


def _least(standing: _RunView) -> str:
    least = standing.least
    return "" if least is None or not standing.total else f", least loss {least.loss:.4f} ({least.candidate.name})"


def _bar(value: float, goal: float) -> ProgressBar:
    return ProgressBar(total=goal, completed=min(value, goal), width=_BAR_WIDTH)


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
