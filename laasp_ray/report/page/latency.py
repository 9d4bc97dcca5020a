"""Latencies on the page of a run: the tile at the top, and the table of engines and batches with the exported files."""

from __future__ import annotations

from laasp_ray.cost.latency import Latency
from laasp_ray.export.latency import EngineLatency
from laasp_ray.report.page import numbers
from laasp_ray.report.page.document import Part, Row, Table, Tile, heads, name, number, text
from laasp_ray.report.page.facts import latency_of
from laasp_ray.report.page.reading import RunRecord
from laasp_ray.run.events import LatencyMeasured, RunFinished, last_of
from laasp_ray.run.totals import exports_of

_WHAT = "Latency"


def latency_tile(record: RunRecord) -> Tile:
    """The latency in the first engine and at the first batch; with a word where the machine was too busy for it."""
    pair = latency_of(record)
    if pair is None:
        ended = last_of(record.events, RunFinished) is not None
        why = "not measured in this run; jobs/evaluate.py measures it" if ended else "measured at the run's end"
        return Tile(what=_WHAT, value=numbers.NONE, note=why)
    before, after = pair
    figures = f"{before.median_ms:.2f} {numbers.ARROW} {after.median_ms:.2f} ms"
    spread = f"10% to 90%: {after.spread[0]:.2f} to {after.spread[1]:.2f} ms"
    note = f"batch {after.batch_size}, {_device(after)}, median of {after.repeats}; {spread}"
    measured = last_of(record.events, LatencyMeasured)
    if measured is not None and any(row.busy for row in measured.rows if row.pruned is after):
        return Tile(what=_WHAT, value="machine too busy", before=figures, note=f"{note}; see Latency and files")
    return Tile(what=_WHAT, value=numbers.change(1 - after.median_ms / before.median_ms), before=figures, note=note)


def latency_part(record: RunRecord) -> Part:
    """Every engine and batch, what has to be said beside the figures, and the files that the network is in."""
    lines = [export.text for export in exports_of(record.events)]
    measured = last_of(record.events, LatencyMeasured)
    rows = measured.rows if measured is not None else ()
    if not rows:
        return Part(title="Latency and files", lines=[*lines, "No latency of several engines was measured."])
    timed = [row.pruned for row in rows if row.pruned is not None]
    if timed:
        lines.append(f"Unpruned and pruned by turns on {_device(timed[0])}; median, and 10% to 90% in brackets.")
    head = heads("engine", "#batch", "#unpruned, ms", "#pruned, ms", "#speed-up", "what to know")
    return Part(title="Latency and files", lines=lines, table=Table(head=head, rows=[_row(row) for row in rows]))


def _row(row: EngineLatency) -> Row:
    speedup = None
    if row.unpruned is not None and row.pruned is not None and row.pruned.median_ms:
        speedup = row.unpruned.median_ms / row.pruned.median_ms
    return Row(
        cells=[
            name(row.engine),
            number(str(row.batch_size), row.batch_size),
            number(_figure(row.unpruned), row.unpruned.median_ms if row.unpruned else None),
            number(_figure(row.pruned), row.pruned.median_ms if row.pruned else None),
            number(numbers.NONE if speedup is None else f"{speedup:.2f}{numbers.TIMES}", speedup),
            text(numbers.cut(row.note) or numbers.NONE),
        ]
    )


def _figure(latency: Latency | None) -> str:
    if latency is None:
        return numbers.NONE
    low, high = latency.spread
    return f"{latency.median_ms:.2f} ({low:.2f} to {high:.2f})"


def _device(latency: Latency) -> str:
    if latency.device != "cpu":
        return latency.device
    return f"CPU, {latency.threads} thread{'' if latency.threads == 1 else 's'}"
