"""What a sweep found, from its trials' folders: the rows, the best of them and the sentence that says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from laasp_ray import models
from laasp_ray.config import RunConfig
from laasp_ray.methods.targets import measure_latency
from laasp_ray.models.untouched import random_state_kept
from laasp_ray.report.sweep import SweepRow, comparable, measure_of, row_from, score_of
from laasp_ray.run.events import RunStarted, read_events
from laasp_ray.run.metrics import TOP1, Measure
from laasp_ray.store.artifact import load_pruned
from laasp_ray.store.journal import Journal
from laasp_ray.sweep.latency import REPEATS
from laasp_ray.sweep.trials import Outcome, folder_of, has_begun

Measured = tuple[tuple[float, float], str]
"""The latencies of the unpruned and the pruned network, ms, and what they were measured on."""


def row_of(run: RunConfig, outcome: Outcome | None, target: str, latency_ms: tuple[float, float] | None) -> SweepRow:
    """The row of a trial, from its journal. `outcome` tells why a trial has no result."""
    uri = folder_of(run).uri
    events = read_events(Journal(folder_of(run))) if has_begun(run) else []
    why = "not finished" if events else "not begun"
    if outcome is not None:
        stopped = outcome.stopped if not events else outcome.stopped and f"stopped: {outcome.stopped}"
        why = outcome.error or stopped or why
    return row_from(run.name, events, target=target, folder=uri, why=why, latency_ms=latency_ms)


@random_state_kept()
def measured_latency(run: RunConfig, unpruned: nn.Module) -> Measured:
    """The latency of a finished run's network beside the unpruned one's, in this process."""
    pruned = load_pruned(folder_of(run), models.build(run.model))
    before, after = measure_latency(unpruned, pruned, run, repeats=REPEATS)
    where = f"{after.device}, {after.threads} threads, batch {after.batch_size}, median of {after.repeats}"
    return (before.median_ms, after.median_ms), where


def best_within(rows: Sequence[SweepRow], points: float) -> tuple[str | None, str]:
    """The best of finished rows by name, and the rule: the largest reduction of FLOPs whose metric is at most `points`
    worse than before the first prune, and if there is none, the best metric."""
    measure, finished = measure_of(rows), comparable(rows)
    best_is = "highest" if measure.better == "higher" else "lowest"
    rule = (
        f"the largest reduction of FLOPs {measure.within(points, 'that before the first prune')}; if there is none, "
        f"the {best_is} {measure.label}"
    )
    kept = [row for row in finished if row.score_before is None or score_of(row) >= row.score_before - points]
    if kept:
        return max(kept, key=lambda row: row.flops_reduction or 0.0).name, rule
    best = max(finished, key=score_of, default=None)
    return None if best is None else best.name, rule


def standard_error(top1: float, images: int) -> float:
    """The standard error of a top-1 of `images` test images, in points of 100%."""
    share = min(max(top1 / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / images)


def bracket_said(
    rows: Mapping[int, SweepRow],
    met: int,
    iterations: int,
    *,
    bar: float,
    base: float,
    points: float,
    images: int,
    measure: Measure = TOP1,
) -> str:
    """The result of a bracket, and how sure it is: the answer, the next deeper iteration, and how far both are from
    the bar beside the noise of their measurement.
    """
    if measure.is_top1:
        error = standard_error(bar, images)
        noise = f"one standard error of top-1 on {images:,} test images is {error:.2f} points"
    else:
        error, noise = 0.0, f"how much {measure.label} varies with the {images:,} test examples is not known"
    below, above = ("below", "above") if measure.better == "higher" else ("above", "below")
    within = f"within {points:g} points of {measure.figure(base)}"
    if not measure.is_top1:
        within = f"with {measure.label} at most {points:g} worse than {measure.figure(base)}"
    if met == 0:
        first = rows.get(1)
        if first is None or first.score_after is None:
            falls = f"was stopped, since it was predicted to end {below} {measure.figure(bar)}"
        else:
            falls = f"already falls {below} {measure.figure(bar)} ({measure.figure(first.score_after)}, {noise})"
        return f"no reduction is {within}: the first iteration {falls}; allow a larger drop, or a smaller prune.step"
    answer = rows[met]
    reduction, score = answer.flops_reduction or 0.0, score_of(answer)
    said = (
        f"the largest reduction {within}: {reduction:.2%} of FLOPs (iteration {met} of "
        f"{iterations}), {measure.text(score)}, {measure.points(score - bar)} {above} the bar"
    )
    deeper = rows.get(met + 1)
    if met == iterations:
        return f"{said}; it is the trajectory's last: a deeper --flops-reduction may be within, too; {noise}"
    if deeper is not None and deeper.score_after is not None:
        gap = bar - deeper.score_after
        said += f"; iteration {met + 1} is {measure.points(gap)} {below} it"
        if min(score - bar, gap) < error:
            return f"{said}; {noise}, so that another seed may choose a neighbour"
        return f"{said}; {noise}"
    return (
        f"{said}; iteration {met + 1} was stopped, since it was predicted to end {below} the bar, and its own end was "
        f"not measured; {noise}"
    )


def test_images(run: RunConfig) -> int:
    """The number of test images of a run that has begun."""
    start = read_events(Journal(folder_of(run)))[0]
    assert isinstance(start, RunStarted)
    return start.test_images
