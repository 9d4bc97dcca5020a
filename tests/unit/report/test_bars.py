"""Bars for work that is counted."""

import io

from laasp_ray.report.bars import LineBars, TerminalBars, make_bars


def test_a_line_for_every_tenth():
    stream, times = io.StringIO(), iter([10.0, 12.0, 75.0, 76.0])
    with LineBars(stream, lambda: next(times)).bar("checking", 1000, "images") as advance:
        for count in (99, 1, 50, 849):
            advance(count)
        advance(1)
    assert stream.getvalue().splitlines() == [
        "checking: 100 of 1,000 images, 2 s",
        "checking: 999 of 1,000 images, 1 min 05 s",
        "checking: 1,000 of 1,000 images, 1 min 06 s",
    ]


def test_a_count_that_is_taken_back_is_not_told_twice():
    stream = io.StringIO()
    with LineBars(stream, lambda: 0.0).bar("making", 20, "images") as advance:
        for count in (10, -10, 10, 10):
            advance(count)
    assert stream.getvalue().splitlines() == ["making: 10 of 20 images, 0 s", "making: 20 of 20 images, 0 s"]


def test_bytes_are_told_in_megabytes_and_nothing_to_do_is_no_error():
    stream = io.StringIO()
    with LineBars(stream, lambda: 0.0).bar("verifying", 2_500_000, "bytes") as advance:
        advance(2_500_000)
    with LineBars(stream, lambda: 0.0).bar("verifying", 0, "bytes"):
        pass
    assert stream.getvalue() == "verifying: 2.5 of 2.5 MB, 0 s\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_it_is_a_bar():
    stream = Terminal()
    bars = make_bars(stream)
    assert isinstance(bars, TerminalBars) and isinstance(make_bars(io.StringIO()), LineBars)
    with bars.bar("making", 1_500, "images") as advance:
        advance(1_500)
    assert "making" in stream.getvalue() and "1,500 of 1,500 images" in stream.getvalue()
