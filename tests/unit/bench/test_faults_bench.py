"""What bench/faults.py draws: faults where they can happen, those first that have happened least."""

import random
from collections import Counter

import faults
from fault_kinds import FAULTS

KINDS = ["start", "epoch", "training_phase", "calibration", "iteration", "epoch", "training_phase", "finish"]
GAPS = [1.0, 0.5, 2.0, 1.0, 1.0, 0.5, 3.0]


def test_a_fault_is_drawn_only_before_an_event_that_it_can_come_before():
    names = ["rank killed", "search worker killed", "driver killed"]
    for seed in range(20):
        strikes = faults.drawn(KINDS, GAPS, 9, names, Counter(), random.Random(seed))
        assert len(strikes) == 9 and [strike.event for strike in strikes] == sorted(strike.event for strike in strikes)
        for strike in strikes:
            before = FAULTS[strike.fault].before
            assert not before or KINDS[strike.event + 1] in before
            assert 0 <= strike.delay <= GAPS[strike.event]
        assert Counter(strike.fault for strike in strikes) == dict.fromkeys(names, 3)


def test_those_that_have_happened_least_come_first():
    before = Counter({"driver killed": 5, "rank killed": 3})
    strikes = faults.drawn(KINDS, GAPS, 7, ["driver killed", "rank killed", "disk full"], before, random.Random(0))
    assert Counter(strike.fault for strike in strikes) == {"disk full": 5, "rank killed": 2}


def test_one_fault_before_every_event_that_it_can_come_before():
    strikes = faults.at_every(KINDS, GAPS, "rank killed", random.Random(0))
    assert [KINDS[strike.event + 1] for strike in strikes] == ["epoch", "training_phase", "epoch", "training_phase"]
    # After the run's last event there is nothing left to disturb.
    assert not faults._may_happen("driver killed", len(KINDS), KINDS)


def test_the_table_counts_runs_that_ended_otherwise(capsys):
    rows = [{"fault": "rank killed", "event": "epoch", "seconds": seconds} for seconds in (10.0, 30.0, 20.0)]
    lines = [
        {"run": 0, "outcomes": rows[:2], "verdict": "the same"},
        {"run": 1, "outcomes": rows[2:], "verdict": "FAILED: it hung"},
    ]
    faults.report(lines)
    told = capsys.readouterr().out
    assert (
        "| rank killed | 3 | 20 | 30 |" in told and "3 faults in 2 runs, 1 of which ended as undisturbed ones" in told
    )
    assert "run 1: FAILED: it hung" in told
