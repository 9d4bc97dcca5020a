"""The bracket on a trajectory: exact, with few trials, and no worse for noise and for trials that end out of order."""

import math
import random

import pytest

from laasp_ray.errors import ConfigError
from laasp_ray.sweep.bracket import Bounds, bounds, cannot_meet, is_needless, next_iterations


def found(last_that_meets, iterations, slots):
    """The answer, the number of trials and that of rounds of `slots` trials at once."""
    results, rounds = {}, 0
    while chosen := next_iterations(results, [], iterations, slots):
        assert len(chosen) <= slots and not set(chosen) & results.keys()
        results |= {iteration: iteration <= last_that_meets for iteration in chosen}
        rounds += 1
    assert bounds(results, iterations).is_exact
    return bounds(results, iterations).met, len(results), rounds


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("iterations", [1, 2, 3, 40, 41])
def test_every_answer_is_found_in_logarithmically_many_rounds(iterations, slots):
    for last in range(iterations + 1):
        answer, trials, rounds = found(last, iterations, slots)
        assert answer == last and trials <= iterations
        # Each round leaves 1/(slots + 1) of what is unknown, and rounding may cost one more.
        assert rounds <= math.ceil(math.log(iterations + 1, slots + 1)) + 1


def test_one_at_a_time_is_bisection():
    # 40 iterations and none known: 0 to 41, whose middle is 20 (20.5, to even). 20 meets: 20 to 41, and so on.
    assert next_iterations({}, [], 40, 1) == [20]
    assert next_iterations({20: True}, [], 40, 1) == [30]
    assert next_iterations({20: True, 30: False}, [], 40, 1) == [25]
    assert next_iterations({20: True, 21: False}, [], 40, 1) == []


def test_several_at_once_cut_evenly():
    assert next_iterations({}, [], 39, 3) == [10, 20, 30]
    assert next_iterations({10: True, 20: True, 30: False}, [], 39, 3) == [22, 25, 28]
    assert next_iterations({1: True}, [], 3, 8) == [2, 3]


def test_a_free_slot_takes_the_middle_of_the_largest_gap_beside_the_running_ones():
    assert next_iterations({}, [20], 39, 1) == [30]  # 0 to 20 and 20 to 40: the deeper of equal gaps
    assert next_iterations({30: False}, [20], 39, 2) == [10, 25]  # 0 to 20, then of three gaps of 10 the deepest
    assert next_iterations({3: True, 5: False}, [4], 39, 2) == []
    # A running trial outside the bounds is none of the marks.
    assert next_iterations({3: True, 8: False}, [20], 39, 1) == [5]


def test_of_contradicting_results_the_deepest_that_met_the_bar_counts():
    assert bounds({5: False, 9: True, 12: False}, 20) == Bounds(9, 12)
    assert bounds({}, 20) == Bounds(0, 21)
    assert bounds({20: True}, 20) == Bounds(20, 21)
    with pytest.raises(ConfigError, match=r"iteration 21 is none of the trajectory's 1 to 20"):
        bounds({21: True}, 20)


def test_what_cannot_change_the_answer_is_needless():
    results = {10: True, 20: False}
    assert [is_needless(iteration, results, 30) for iteration in (5, 10, 11, 19, 20, 25)] == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]


def test_slots_that_free_up_in_any_order_still_find_every_answer():
    for seed in range(50):
        draw = random.Random(seed)
        iterations, slots = draw.randint(1, 60), draw.randint(1, 5)
        last, results, running, trials = draw.randint(0, iterations), {}, [], 0
        while True:
            running = [iteration for iteration in running if not is_needless(iteration, results, iterations)]
            new = next_iterations(results, running, iterations, slots - len(running))
            assert not set(new) & {*running, *results}
            running, trials = running + new, trials + len(new)
            if not running:
                break
            done = running.pop(draw.randrange(len(running)))
            results[done] = done <= last
        assert bounds(results, iterations) == Bounds(last, last + 1) and trials <= iterations


def test_a_trial_is_given_up_when_what_others_gained_would_not_do():
    finished = [
        [80.0, 88.0, 90.0],
        [70.0, 85.0, 89.5],
    ]  # gains from the first epoch: 10 and 19.5, from the second 2, 4.5
    assert not cannot_meet([75.0], 90.0, finished, slack=0.0)  # 75 + 19.5
    assert cannot_meet([75.0, 85.0], 90.0, finished, slack=0.0)  # 85 + 4.5 = 89.5
    assert not cannot_meet([75.0, 85.0], 90.0, finished, slack=0.5)  # just 90
    assert not cannot_meet([10.0], 90.0, [], slack=0.0)
    assert not cannot_meet([], 90.0, finished, slack=0.0)
    assert not cannot_meet([1.0, 1.0, 1.0, 1.0], 90.0, finished, slack=0.0)  # longer than any that ended
