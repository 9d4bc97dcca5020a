"""The pictures of a run's page with their texts; one that cannot be drawn says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from laasp_ray.report.page import charts
from laasp_ray.report.page.document import Chart
from laasp_ray.report.page.facts import (
    curves_of,
    iterations_of,
    layers_of,
    loss_map,
    seconds_by_part,
    wins_of,
)
from laasp_ray.report.page.reading import RunRecord
from laasp_ray.report.summary import Summary
from laasp_ray.run.metrics import label_of


@dataclass(frozen=True)
class Pictures:
    """Those of the course of the run, and those of its layers."""

    happened: Sequence[Chart]
    layers: Sequence[Chart]


def pictures_of(record: RunRecord, summary: Summary) -> Pictures:
    """Those of a run and its summary."""
    return Pictures(
        [*_over_time(record, summary.noun), _flops(record, summary.targets.get("FLOPs")), _seconds(record)],
        [_winners(record), _widths(record), _heat(record)],
    )


def _over_time(record: RunRecord, noun: str) -> list[Chart]:
    curves = curves_of(record)
    if not curves.train and not curves.test:
        return [Chart(title="Loss and accuracy", text="Nothing has been trained or evaluated yet.")]
    said = "A green line is a prune; the shaded time is spent on prunes and fine-tuning."
    if curves.faults:
        said += " A triangle is a fault that the run survived."
    shown = [Chart(title="Loss", text=said, svg=charts.loss_over_time(curves))]
    if curves.metric != "loss":
        title = label_of(curves.metric)
        text = "Of the test data."
        if any(point.metric is not None for point in curves.train):
            text = f"Of training with augmentation, and of the test {noun}."
        shown.append(Chart(title=title[0].upper() + title[1:], text=text, svg=charts.metric_over_time(curves)))
    return shown


def _flops(record: RunRecord, target: float | None) -> Chart:
    rows = [row for row in iterations_of(record) if row.layers]
    if not rows:
        return Chart(title="FLOPs gone", text="No filters have been removed.")
    each = "Each bar is what an iteration removed, on top of those before."
    return Chart(title="FLOPs gone, iteration by iteration", text=each, svg=charts.flops_gone(rows, target))


def _seconds(record: RunRecord) -> Chart:
    parts = seconds_by_part(record)
    if not parts:
        return Chart(title="Where the time went", text="No work is recorded yet.")
    return Chart(title="Where the time went", text="Work of all drivers, without pauses.", svg=charts.seconds(parts))


def _winners(record: RunRecord) -> Chart:
    won = wins_of(record)
    if not won:
        return Chart(title="Which layers and criteria won", text="No prune has been chosen yet.")
    few = "" if len(won) <= charts.MOST_WINNERS else f" The {charts.MOST_WINNERS} with the most of {len(won)} layers."
    said = f"Prunes of each layer, by the criterion that chose them; in brackets all of a criterion.{few}"
    return Chart(title="Which layers and criteria won", text=said, svg=charts.winners(won))


def _widths(record: RunRecord) -> Chart:
    every = layers_of(record)
    changed = [layer for layer in every if layer.kept != layer.filters]
    if not changed:
        return Chart(title="Width of every layer", text="No layer has lost filters.")
    shown, said = every, "Filters of each layer: unpruned (light) and now."
    if len(every) > charts.MOST_ROWS:
        shown = changed
        said = f"The {len(changed)} of {len(every)} layers that lost filters: unpruned (light) and now."
        if len(changed) > charts.MOST_ROWS:
            said += f" The first {charts.MOST_ROWS}; the table below has all."
    return Chart(title="Width of every layer", text=said, svg=charts.widths(shown))


def _heat(record: RunRecord) -> Chart:
    title = "Candidates' losses"
    made = iterations_of(record)
    compared = [row.number for row in made if row.candidates]
    if not compared:
        return Chart(title=title, text="No candidates were compared." if made else "No iteration has been made yet.")
    found = loss_map(record)
    if found is None:
        return Chart(title=title, text="The folder no longer has the candidates' losses (candidates/).")
    missing = [number for number in compared if number not in record.candidates]
    said = (
        "The least loss of each layer's candidates, above the least of the iteration: dark is harmless, and the "
        "highest tenth is drawn alike. A dot is the prune that was made; an empty cell had no candidate."
    )
    if missing:
        said += f" Iterations without stored losses: {len(missing)}."
    return Chart(title=title, text=said, svg=charts.heat_map(found))
