"""Tables as lines of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table_lines(rows: Sequence[Sequence[str]], *, rule: bool = True, left: Collection[int] = (0,)) -> list[str]:
    """Columns as wide as their widest cell, two spaces between them; no spaces at the ends of lines.

    The columns numbered in `left` are aligned to the left, the others to the right. The first row is the head, with a
    line of dashes under it if `rule`. Raises ValueError if the rows are of different lengths.
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
