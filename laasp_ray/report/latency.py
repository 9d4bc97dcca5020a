"""Latencies of the unpruned and the pruned network as a table, with what has to be said beside it."""

from __future__ import annotations

from collections.abc import Sequence

from laasp_ray.cost.latency import Latency
from laasp_ray.export.latency import EngineLatency
from laasp_ray.report.tables import table_lines

_BUSY = "!"


def latency_lines(rows: Sequence[EngineLatency]) -> list[str]:
    """A table with a row for each engine and batch, and the notes. An engine has a mark if its figures mean nothing."""
    head = ("latency, ms (10th to 90th percentile)", "batch", "unpruned", "pruned", "speed-up", "passes")
    lines = table_lines([head, *map(_cells, rows)])
    devices = sorted({f"{row.pruned.device}, {row.pruned.threads} threads" for row in rows if row.pruned is not None})
    if devices:
        lines.append(f"Forward passes by turns on {'; '.join(devices)}")
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            notes.setdefault(row.note, []).append(f"{row.engine} at batch {row.batch_size}")
    return lines + [
        f"{_BUSY if 'too busy' in note else '-'} {', '.join(where)}: {note}" for note, where in notes.items()
    ]


def _cells(row: EngineLatency) -> tuple[str, ...]:
    speedup = "-"
    if row.unpruned is not None and row.pruned is not None and row.pruned.median_ms:
        speedup = f"{row.unpruned.median_ms / row.pruned.median_ms:.2f}x"
    mark = f" {_BUSY}" if row.busy else ""
    passes = "-" if row.pruned is None else str(row.pruned.repeats)
    return (
        f"{row.engine}{mark}",
        str(row.batch_size),
        _figure(row.unpruned),
        _figure(row.pruned),
        speedup,
        passes,
    )


def _figure(latency: Latency | None) -> str:
    if latency is None:
        return "-"
    low, high = latency.spread
    digits = 2 if latency.median_ms >= 1 else 3
    return f"{latency.median_ms:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
