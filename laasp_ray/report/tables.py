"""Tables as lines of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table_lines(rows: Sequence[Sequence[str]], *, rule: bool = True, left: Collection[int] = (0,)) -> list[str]:
    """Formats rows as columns. A column is as wide as its widest cell, with two spaces between columns and none at line
    ends.

    The columns numbered in `left` are aligned to the left, the others to the right. The first row is the head; with
    `rule` a line of dashes follows it. Raises ValueError if the rows are of different lengths.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]] if rule else lines
