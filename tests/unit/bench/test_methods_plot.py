"""The picture of bench/methods.py's rows."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import pytest
from methods_plot import drawn, points
from methods_table import Row

ROW = Row(
    method="laasp",
    target=0.3,
    seed=0,
    top1=0.88,
    loss=0.4,
    top1_before=0.92,
    loss_before=0.2,
    flops_reduction=0.31,
    parameters_reduction=0.2,
    parameters=100,
    iterations=10,
    fine_tunes=3,
    iteration_seconds=1.0,
    epoch_seconds=1.0,
    seconds=20.0,
)
ROWS = [
    dataclasses.replace(ROW, target=0.5, top1=0.8, flops_reduction=0.5),
    ROW,
    dataclasses.replace(ROW, seed=1, top1=0.90, flops_reduction=0.33),
    dataclasses.replace(ROW, method="l1", top1=0.7),
]


def test_a_point_is_a_mean_over_seeds_with_the_sample_standard_deviation():
    first, second = points(ROWS, "laasp")
    assert first == pytest.approx((32.0, 89.0, 2**0.5))
    assert second == pytest.approx((50.0, 80.0, 0.0))


def test_methods_with_rows_are_in_the_legend(tmp_path):
    figure = drawn(ROWS, ["laasp", "l1", "pls"])
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["before pruning", "LAASP as in the paper", "l1, layers by loss"]
    figure.savefig(tmp_path / "picture.svg")
    assert ElementTree.parse(tmp_path / "picture.svg").getroot().tag.endswith("svg")
