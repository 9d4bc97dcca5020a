"""Tables as text."""

import pytest

from laasp_ray.report.tables import table_lines

ROWS = [("", "before", "after"), ("MACs", "1,000", "9"), ("top-1", "5", "")]


def test_the_first_column_is_aligned_left_and_the_head_underlined():
    assert table_lines(ROWS) == [
        "       before  after",
        "--------------------",
        "MACs    1,000      9",
        "top-1       5",
    ]


def test_without_a_rule_and_with_other_columns_to_the_left():
    assert table_lines(ROWS, rule=False, left=(0, 2)) == [
        "       before  after",
        "MACs    1,000  9",
        "top-1       5",
    ]


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(ValueError):
        table_lines([("a", "b"), ("c",)])
