"""The table of jobs/evaluate.py: the pruned network next to the unpruned one, as text."""

from __future__ import annotations

from laasp_ray.report.latency import latency_lines
from laasp_ray.report.tables import table_lines
from laasp_ray.run.evaluate import Evaluation
from laasp_ray.run.metrics import form_of, label_of


def evaluation_table(evaluation: Evaluation) -> str:
    """The figures side by side, then the latencies, as text."""
    unpruned, pruned = evaluation.unpruned, evaluation.pruned
    rows: list[tuple[str, str, str, str]] = [("", "unpruned", "pruned", "pruned / unpruned")]

    def row(label: str, form: str, a: float, b: float, ratio: bool = True) -> None:
        rows.append((label, form.format(a), form.format(b), f"{b / a:.3f}" if ratio and a else ""))

    theirs = unpruned.metrics.named
    for name, value in pruned.metrics.named.items():
        row(label_of(name), form_of(name), theirs[name], value, ratio=False)
    row("loss", "{:.4f}", unpruned.metrics.loss, pruned.metrics.loss, ratio=False)
    row("MACs", "{:,}", unpruned.macs, pruned.macs)
    row("parameters", "{:,}", unpruned.parameters, pruned.parameters)
    lines = table_lines(rows, rule=False)
    lines.append(f"{pruned.metrics.images} test {evaluation.noun}; MACs: convolutions and linear layers at one input")
    if evaluation.latency:
        lines += ["", *latency_lines(evaluation.latency)]
    return "\n".join(lines)
