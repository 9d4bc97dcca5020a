"""What bench/faults.py draws: faults where they can happen, those first that have happened least."""

import random
from collections import Counter

import faults
import pytest
from fault_kinds import FAULTS, MEMORY_SHORT

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


class Ended:
    """The folder of a run that ended, of one iteration."""

    def __init__(self, loss=0.5, filters=(1, 2), weights="abc"):
        self.decision = {"layer": "conv1", "filters": filters, "loss": loss, "loss_before": 0.25}
        self.weights = weights

    def decisions(self):
        return [self.decision]

    def outcome(self):
        return {"decisions": repr(self.decision), "plan": "p", "weights": self.weights}


@pytest.mark.parametrize(
    ("ended", "struck", "verdict"),
    [
        (Ended(), MEMORY_SHORT, "the same"),
        (Ended(loss=0.500001), MEMORY_SHORT, "the same, but for 2e-06 of a loss (memory was short)"),
        (Ended(loss=0.500001), "rank killed", "DIFFERENT"),
        (Ended(loss=0.51), MEMORY_SHORT, "DIFFERENT"),
        (Ended(filters=(1, 3)), MEMORY_SHORT, "DIFFERENT"),
        (Ended(loss=0.500001, weights="abd"), MEMORY_SHORT, "DIFFERENT"),
    ],
)
def test_only_memory_that_was_short_excuses_the_last_digits_of_a_loss(ended, struck, verdict):
    found = faults.verdict_of(ended, Ended(), [faults.Strike(0, 0.0, struck)])
    assert found == verdict if verdict != "DIFFERENT" else found.startswith("DIFFERENT: ")


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
