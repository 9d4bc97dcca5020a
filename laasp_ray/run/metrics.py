"""How metrics are written: top-1 and top-5 in percent, metrics of the user's own as plain numbers."""

from __future__ import annotations

from laasp_ray.records import Metrics

_LABELS = {"top1": "top-1", "top5": "top-5"}


def label_of(name: str) -> str:
    """What a metric is called in texts."""
    return _LABELS.get(name, name)


def form_of(name: str) -> str:
    """The format of a metric's value."""
    return "{:.2%}" if name in _LABELS else "{:.4f}"


def noun_of(factory: object) -> str:
    """What the data of a run consist of, by its own data set or that one's factory, if any: it need not have images."""
    return "examples" if factory else "images"


def metric_text(name: str, value: float) -> str:
    """`top-1 93.10%`, `mIoU 0.7312`."""
    return f"{label_of(name)} {form_of(name).format(value)}"


def metrics_text(metrics: Metrics) -> str:
    """All metrics, the primary one first, then the loss."""
    return ", ".join([*(metric_text(*item) for item in metrics.named.items()), f"loss {metrics.loss:.4f}"])


def primary_text(metrics: Metrics) -> str:
    """The primary metric; nothing if it is the loss."""
    name, value = metrics.primary
    return "" if name == "loss" else metric_text(name, value)
