"""The table of jobs/evaluate.py: the pruned network next to the unpruned one, as text."""

from __future__ import annotations

from laasp_ray.report.metrics import form_of, label_of
from laasp_ray.report.tables import table_lines
from laasp_ray.run.evaluate import Measured


def evaluation_table(measured: tuple[Measured, Measured]) -> str:
    """The figures side by side, as text."""
    unpruned, pruned = measured
    rows: list[tuple[str, str, str, str]] = [("", "unpruned", "pruned", "pruned / unpruned")]

    def row(label: str, form: str, a: float, b: float, ratio: bool = True) -> None:
        rows.append((label, form.format(a), form.format(b), f"{b / a:.3f}" if ratio and a else ""))

    theirs = unpruned.metrics.named
    for name, value in pruned.metrics.named.items():
        row(label_of(name), form_of(name), theirs[name], value, ratio=False)
    row("loss", "{:.4f}", unpruned.metrics.loss, pruned.metrics.loss, ratio=False)
    row("MACs", "{:,}", unpruned.macs, pruned.macs)
    row("parameters", "{:,}", unpruned.parameters, pruned.parameters)
    row("latency, ms", "{:.2f}", unpruned.latency.median_ms, pruned.latency.median_ms)
    lines = table_lines(rows, rule=False)
    how = pruned.latency
    lines.append(
        f"{pruned.metrics.images} test images; latency: median of {how.repeats}, batch {how.batch_size}, {how.device}, "
        f"{how.threads} threads; MACs: convolutions and linear layers at one input"
    )
    return "\n".join(lines)
