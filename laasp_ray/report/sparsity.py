"""The table of a group sparsity run: the content of its `sparsity.json` as text."""

from __future__ import annotations

from collections.abc import Sequence

from laasp_ray.methods.sparsity_report import LANES, LayerSparsity
from laasp_ray.report.tables import table_lines


def sparsity_table(rows: Sequence[LayerSparsity]) -> str:
    """The report as text: a line for each layer, and the totals."""
    head = ("layer", "weights", "density", "g/p", "used", "unstructured", "left dense because")
    lines = [head, *map(_line, rows)]
    weights, kept = sum(row.weights for row in rows), sum(row.kept for row in rows)
    macs, left = sum(row.macs for row in rows), sum(row.macs * row.density for row in rows)
    lines.append(("all layers", f"{weights:,}", f"{kept / weights:.2%}", "", "", "", ""))
    text = table_lines(lines, rule=False, left=(0, len(head) - 1))
    text.append(
        f"multiply-accumulates with non-zero weights: {left:,.0f} of {macs:,}; used: share of the multipliers that are "
        f"busy on a simulated accelerator of {LANES} lanes, unstructured: with pruning of the same density"
    )
    return "\n".join(text)


def _line(row: LayerSparsity) -> tuple[str, ...]:
    used = ("-" if share is None else f"{share:.1%}" for share in (row.utilisation, row.utilisation_unstructured))
    rule = "-" if row.group is None else f"{row.group}/{row.prune}"
    return (row.layer, f"{row.weights:,}", f"{row.density:.2%}", rule, *used, row.reason)
