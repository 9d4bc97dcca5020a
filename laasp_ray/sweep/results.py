"""What a sweep found, from its trials' folders: the rows, the best of them and the sentence that says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from laasp_ray import models
from laasp_ray.config import RunConfig
from laasp_ray.methods.targets import measure_latency
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.report.summary import summarise
from laasp_ray.report.sweep import FINISHED, SweepRow
from laasp_ray.run.events import RunFinished, RunStarted, last_of, read_events
from laasp_ray.run.totals import seconds_spent
from laasp_ray.store.artifact import load_pruned
from laasp_ray.store.journal import Journal
from laasp_ray.sweep.latency import REPEATS
from laasp_ray.sweep.trials import Outcome, folder_of, has_begun, percent_of

Measured = tuple[tuple[float, float], str]
"""The latencies of the unpruned and the pruned network, ms, and what they were measured on."""


def row_of(run: RunConfig, outcome: Outcome | None, target: str, latency_ms: tuple[float, float] | None) -> SweepRow:
    """The row of a trial, from its journal. `outcome` tells why a trial has no result."""
    uri = folder_of(run).uri
    events = read_events(Journal(folder_of(run))) if has_begun(run) else []
    if not events:
        why = "not begun" if outcome is None else outcome.error or outcome.stopped or "not begun"
        return SweepRow(name=run.name, target=target, folder=uri, status=why)
    summary, start = summarise(events), events[0]
    finish = last_of(events, RunFinished)
    why = "not finished"
    if outcome is not None:
        why = outcome.error or (outcome.stopped and f"stopped: {outcome.stopped}") or why
    shared = dict(start.forked or {}) if isinstance(start, RunStarted) else {}
    return SweepRow(
        name=run.name,
        target=target,
        folder=uri,
        status=FINISHED if finish is not None else why,
        flops_reduction=summary.reached["FLOPs"],
        macs=summary.macs_after,
        macs_unpruned=summary.macs,
        parameters=summary.parameters_after,
        parameters_unpruned=summary.parameters,
        latency_ms=latency_ms,
        top1_before=None if summary.before is None else percent_of(summary.before),
        top1_after=None if summary.after is None else percent_of(summary.after),
        seconds=seconds_spent(events),
        shared_seconds=float(shared.get("seconds", 0.0)),
    )


@random_state_kept()
def measured_latency(run: RunConfig, unpruned: nn.Module) -> Measured:
    """The latency of a finished run's network beside the unpruned one's, in this process."""
    pruned = load_pruned(folder_of(run), models.build(run.model))
    before, after = measure_latency(unpruned, pruned, run, repeats=REPEATS)
    where = f"{after.device}, {after.threads} threads, batch {after.batch_size}, median of {after.repeats}"
    return (before.median_ms, after.median_ms), where


def best_within(rows: Sequence[SweepRow], points: float) -> tuple[str | None, str]:
    """The best of finished rows by name, and the rule: the largest reduction of FLOPs whose top-1 is at most `points`
    below that from before the first prune, and if there is none, the highest top-1."""
    rule = (
        f"the largest reduction of FLOPs whose top-1 is at most {points:g} points below that before the first prune; "
        "if there is none, the highest top-1"
    )
    finished = [row for row in rows if row.is_finished]
    kept = [row for row in finished if (row.top1_after or 0.0) >= (row.top1_before or 0.0) - points]
    if kept:
        return max(kept, key=lambda row: row.flops_reduction or 0.0).name, rule
    best = max(finished, key=lambda row: row.top1_after or 0.0, default=None)
    return None if best is None else best.name, rule


def standard_error(top1: float, images: int) -> float:
    """The standard error of a top-1 of `images` test images, in points of 100%."""
    share = min(max(top1 / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / images)


def bracket_said(
    rows: Mapping[int, SweepRow], met: int, iterations: int, *, bar: float, base: float, points: float, images: int
) -> str:
    """The result of a bracket, and how sure it is: the answer, the next deeper iteration, and how far both are from
    the bar beside the noise of their measurement.
    """
    error = standard_error(bar, images)
    noise = f"one standard error of top-1 on {images:,} test images is {error:.2f} points"
    if met == 0:
        first = rows.get(1)
        if first is None or first.top1_after is None:
            falls = f"was stopped, since it was predicted to end below {bar:.2f}%"
        else:
            falls = f"already falls below {bar:.2f}% ({first.top1_after:.2f}%, {noise})"
        return (
            f"no reduction is within {points:g} points of {base:.2f}%: the first iteration {falls}; allow a larger "
            "drop, or a smaller prune.step"
        )
    answer = rows[met]
    reduction, top1 = answer.flops_reduction or 0.0, answer.top1_after or 0.0
    said = (
        f"the largest reduction within {points:g} points of {base:.2f}%: {reduction:.2%} of FLOPs (iteration {met} of "
        f"{iterations}), top-1 {top1:.2f}%, {top1 - bar:.2f} above the bar"
    )
    deeper = rows.get(met + 1)
    if met == iterations:
        return f"{said}; it is the trajectory's last: a deeper --flops-reduction may be within, too; {noise}"
    if deeper is not None and deeper.top1_after is not None:
        gap = bar - deeper.top1_after
        said += f"; iteration {met + 1} is {gap:.2f} below it"
        if min(top1 - bar, gap) < error:
            return f"{said}; {noise}, so that another seed may choose a neighbour"
        return f"{said}; {noise}"
    return (
        f"{said}; iteration {met + 1} was stopped, since it was predicted to end below the bar, and its own end was "
        f"not measured; {noise}"
    )


def test_images(run: RunConfig) -> int:
    """The number of test images of a run that has begun."""
    start = read_events(Journal(folder_of(run)))[0]
    assert isinstance(start, RunStarted)
    return start.test_images
