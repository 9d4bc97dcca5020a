"""Remaining time, with a clock set by hand."""

import pytest

from laasp_ray.report.eta import EtaEstimator, format_duration


def test_the_mean_pace_so_far_gives_the_remaining_time():
    now = [100.0]
    pace = EtaEstimator(lambda: now[0])
    assert pace.seconds_until(10) is None
    pace.update(2)
    assert pace.seconds_until(10) is None  # nothing has grown yet
    now[0] = 106
    pace.update(4)  # 2 in 6 s
    assert pace.seconds_until(10) == 18
    now[0] = 110
    assert pace.seconds_until(10) == 14  # it counts down in between
    now[0] = 200
    assert pace.seconds_until(10) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations_read_well(seconds, text):
    assert format_duration(seconds) == text
