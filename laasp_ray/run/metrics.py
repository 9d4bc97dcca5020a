"""How metrics are written: top-1 and top-5 in percent, metrics of the user's own as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class Measure:
    """What networks are compared by: the primary metric of their task, or its loss.

    A score of it is higher for the better network: top-1 in percent, any other value as it is, and with the opposite
    sign if lower values are better. Differences of scores are in points of 100% or in the value's own unit.
    """

    name: str = "top1"
    better: Literal["higher", "lower"] = "higher"

    @staticmethod
    def of(metrics: Metrics) -> Measure:
        """That of the task which an evaluation was made for."""
        return Measure(metrics.primary[0], metrics.better)

    @property
    def is_top1(self) -> bool:
        return self.name == "top1"

    @property
    def label(self) -> str:
        return label_of(self.name)

    @property
    def title(self) -> str:
        """Its name at the beginning of a sentence."""
        return self.label[0].upper() + self.label[1:]

    @property
    def axis(self) -> str:
        """Its name with its unit."""
        return f"{self.label}, %" if self.is_top1 else self.label

    def score(self, metrics: Metrics) -> float:
        """-inf if the value is NaN."""
        return 100 * metrics.score if self.is_top1 else metrics.score

    def value(self, score: float) -> float:
        """The value (top-1 in percent) of a score, and the score of a value."""
        return score if self.better == "higher" else -score

    def figure(self, score: float) -> str:
        """The value of a score as text."""
        return f"{score:.2f}%" if self.is_top1 else f"{self.value(score):.4f}"

    def text(self, score: float) -> str:
        """The name and the value of a score."""
        return f"{self.label} {self.figure(score)}"

    def points(self, difference: float) -> str:
        """A difference of scores as text."""
        return f"{difference:.2f}" if self.is_top1 else f"{difference:.4f}"

    def within(self, points: float, base: str) -> str:
        """The condition of being at most `points` worse than `base`, in words."""
        if self.is_top1:
            return f"whose top-1 is at most {points:g} points below {base}"
        return f"whose {self.label} is at most {points:g} worse than {base}"


TOP1 = Measure()
