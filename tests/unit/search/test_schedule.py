"""Units of work: how an iteration is cut, and that what comes out does not depend on who does them, and when."""

import itertools
import math
import random

import numpy as np
import pytest

from laasp_ray.search.engine import Cost, Losses
from laasp_ray.search.racing import Race
from laasp_ray.search.schedule import UNITS_PER_SLOT, Settings, cut, measure
from laasp_ray.search.stratified import Sample


class FakeBackend:
    """A WorkBackend that knows all losses; units come back in an order drawn from `seed`, or first in, first out."""

    def __init__(self, losses, slots=1, seed=None, failing=()):
        self.losses, self.slots, self.failing = losses, slots, set(failing)
        self._draw = None if seed is None else random.Random(seed)
        self.submitted, self.waiting, self.events = [], [], []

    def cost(self, task):
        last = len(self.losses) - 1
        return Cost(0, 100) if task == last else Cost(10 * (task % 10), 100 - 10 * (task % 10))

    def submit(self, unit):
        self.submitted.append(unit)
        self.waiting.append(unit)
        self.events.append(("submit", unit))

    def collect(self):
        unit = self.waiting.pop(0 if self._draw is None else self._draw.randrange(len(self.waiting)))
        self.events.append(("collect", unit))
        values = self.losses[np.ix_(unit.tasks, unit.images)].copy()
        errors = {row: "RuntimeError: broken" for row, task in enumerate(unit.tasks) if task in self.failing}
        values[list(errors)] = np.nan
        return unit, Losses(values, errors, 0.001 * len(unit.tasks) * len(unit.images))


def matrix(candidates, images, seed=0):
    """Losses (candidates + 1, images), the unpruned network's last; candidates 0.01 apart, in a drawn order."""
    draw = np.random.default_rng(seed)
    base = np.where(draw.random(images) < 0.25, draw.gamma(1.0, 0.8, images), draw.gamma(0.5, 0.02, images))
    worse = 0.01 * draw.permutation(candidates)[:, None]
    noise = draw.normal(0, 0.3, (candidates, images)) * (0.05 + base)
    return np.concatenate([base + worse + noise, base[None]]).astype(np.float32)


def ignore(*_):
    return None


COSTS = [Cost(10 * depth, 100 - 10 * depth) for depth in (3, 0, 7, 3, 3, 5, 0, 7, 1, 3, 2)]


@pytest.mark.parametrize("slots", [1, 2, 7, 64])
@pytest.mark.parametrize("speed", [0.0, 1.0, 3e4, 1e9])
@pytest.mark.parametrize("batch_size", [1, 7, 250])
@pytest.mark.parametrize("candidates_per_task", [0, 1, 3])
def test_a_cut_covers_every_task_and_image_once_within_its_limits(slots, speed, batch_size, candidates_per_task):
    images = np.random.default_rng(0).permutation(200)[:33]
    settings = Settings(200, batch_size, candidates_per_task)
    for tasks in ([10], [0, 1], [1, 2, 4, 5, 7, 8, 9], list(range(11))):
        units = cut(COSTS, tasks, images, settings, slots, speed)
        pairs = [pair for unit in units for pair in itertools.product(unit.tasks, unit.images.tolist())]
        assert len(pairs) == len(set(pairs)) == len(tasks) * 33
        assert set(pairs) == set(itertools.product(tasks, images.tolist()))
        assert max(len(unit.images) for unit in units) <= batch_size
        if candidates_per_task:
            assert max(len(unit.tasks) for unit in units) <= candidates_per_task
        spent = [len(unit.images) * sum(COSTS[task].own for task in unit.tasks) for unit in units]
        assert spent == sorted(spent, reverse=True)


def test_candidates_are_cut_into_groups_of_about_equal_cost_by_depth():
    # By depth: 1 6 8 10 0 3 4 9 5 2 7, which own 100 100 90 80 70 70 70 70 50 30 30, 760 in all. Eight slots get 8
    # groups of about 95: one is begun whenever those before it have their 95 each.
    units = cut(COSTS, range(11), np.arange(20), Settings(20, 20), 8, 0.0)
    assert {unit.tasks for unit in units} == {(1,), (6,), (8,), (10, 0), (3,), (4,), (9, 5), (2, 7)}
    depths = sorted([min(COSTS[t].shared for t in u.tasks), max(COSTS[t].shared for t in u.tasks)] for u in units)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(depths))


def test_a_single_hand_never_runs_the_shared_part_twice():
    for speed in (0.0, 1.0, 1e9):
        units = cut(COSTS, range(11), np.arange(50), Settings(50, 25), 1, speed)
        assert [len(unit.images) for unit in units] == [25, 25]
        assert all(sorted(unit.tasks) == list(range(11)) for unit in units)


def test_candidates_are_cut_apart_only_as_far_as_they_are_done_sooner():
    # All of them cost 70 shared + 760 own. One batch for two slots: 2 groups of 70 + 380 = 450, where 4 would take two
    # rounds of 70 + 190, 520. Four batches: uncut, two rounds of 830, 1,660; cut in two, four of 450, 1,800.
    settings = Settings(100, 100)
    assert len(cut(COSTS, range(11), np.arange(100), settings, 2, 0.0)) == 2
    assert len(cut(COSTS, range(11), np.arange(100), Settings(100, 25), 2, 0.0)) == 4
    # Three batches leave a slot idle for a second of 4 * 415 = 1,660 unless they are cut: 3 rounds of 450, 1,350.
    assert len(cut(COSTS, range(11), np.arange(100), Settings(100, 34), 2, 0.0)) == 6


def test_hands_that_are_faster_than_handing_out_get_few_units():
    # 100 images * 830 = 83,000. At 1e9 a second a second unit would cost 3 ms to save 40 microseconds. If they take
    # 26.9 ms, 3 ms are worth 92.6 an image: 2 units end at 185 + 450 + 45, 3 at 278 + 323 + 32, 4 at 370 + 260 + 26.
    settings, images = Settings(100, 100), np.arange(100)
    assert len(cut(COSTS, range(11), images, settings, 2, 1e9)) == 1
    assert len(cut(COSTS, range(11), images, settings, 64, 83_000 / 0.0269)) == 3


def results_of(losses, racing, slots, order, **more):
    settings = Settings(losses.shape[1], 64, racing=racing, seed=3, **more)
    results = measure(FakeBackend(losses, slots, order), len(losses), settings, ignore)
    return [(result.loss, result.images, result.dropped_at) for result in results]


@pytest.mark.parametrize("racing", [True, False])
@pytest.mark.parametrize("candidates_per_task", [0, 1, 3])
def test_what_comes_out_does_not_depend_on_hands_or_order(racing, candidates_per_task):
    losses = matrix(25, 900)
    alone = results_of(losses, racing, 1, None)
    for slots, order in itertools.product((1, 2, 7, 64), (0, 1)):
        assert results_of(losses, racing, slots, order, candidates_per_task=candidates_per_task) == alone


def test_exhaustive_losses_are_the_means_over_all_images():
    losses = matrix(6, 300)
    for (loss, images, dropped_at), row in zip(results_of(losses, False, 3, 0), losses, strict=True):
        assert (images, dropped_at) == (300, None)
        assert loss == pytest.approx(row.astype(np.float64).mean(), rel=1e-12)


def test_a_race_gives_what_race_itself_gives_round_by_round():
    losses = matrix(25, 900)
    race = Race(losses[-1], 25, seed=3)
    while requests := race.requests():
        for request in requests:
            race.finish(request, losses[np.ix_(request.candidates, request.images)])
    found = results_of(losses, True, 7, 1)
    assert [item[2] for item in found[:-1]] == [race.fell.get(candidate) for candidate in range(25)]
    assert [item[1] for item in found] == [*race.images.tolist(), 900]
    assert [item[0] for item in found[:-1]] == race.estimates.tolist()
    assert sum(found[k][2] is None for k in range(25)) < 25


def test_idle_workers_begin_with_the_next_round_before_this_one_is_over():
    losses = matrix(25, 900)
    for slots, early in ((1, False), (7, True)):
        backend = FakeBackend(losses, slots, 0)
        measure(backend, 26, Settings(900, 64, racing=True), ignore)
        samples = [set(sample.tolist()) for sample in Sample(losses[-1], 0).rounds]

        def round_of(unit, samples=samples):
            return next(number for number, sample in enumerate(samples) if int(unit.images[0]) in sample)

        events = [(what, round_of(unit)) for what, unit in backend.events if unit.tasks != (25,)]
        last_of_first = max(n for n, event in enumerate(events) if event == ("collect", 0))
        first_of_second = events.index(("submit", 1))
        assert (first_of_second < last_of_first) is early
        # Nobody begins with the round after the next one.
        assert ("submit", 2) not in events[:last_of_first]
        # No slot is asked for what nobody is free for, and each pair is measured once.
        pairs = [pair for unit in backend.submitted for pair in itertools.product(unit.tasks, unit.images.tolist())]
        assert len(pairs) == len(set(pairs))
        assert backend.waiting == []


@pytest.mark.parametrize("racing", [True, False])
@pytest.mark.parametrize("slots", [1, 7])
def test_a_task_that_fails_says_why_and_the_others_go_on(racing, slots):
    losses = matrix(12, 600)
    best = int(losses[:-1].mean(1).argmin())
    results = measure(
        FakeBackend(losses, slots, 0, failing=[best]), 13, Settings(600, 64, racing=racing, seed=1), ignore
    )
    assert math.isnan(results[best].loss)
    assert results[best].error == "RuntimeError: broken"
    assert all(result.error == "" and math.isfinite(result.loss) for k, result in enumerate(results) if k != best)
    others = [k for k in range(12) if k != best]
    kept = [k for k in others if results[k].dropped_at is None]
    second = min(others, key=lambda k: losses[k].mean())
    assert min(kept, key=lambda k: results[k].loss) == second


def test_what_fails_where_only_other_workers_would_have_measured_does_not_count():
    """A loser fails in the round after the one that decides, which only several workers begin with."""
    losses = np.zeros((3, 400), np.float32)
    losses[1] = 5.0  # worse on every image: it falls when the leader is known
    second = set(Sample(losses[-1], 0).rounds[1].tolist())

    class FailsLater(FakeBackend):
        def collect(self):
            unit, found = super().collect()
            if unit.tasks == (1,) and second & set(unit.images.tolist()):
                found.values[0] = np.nan
                return unit, Losses(found.values, {0: "RuntimeError: late"}, found.seconds)
            return unit, found

        def submit(self, unit):
            # Last in, first out: the next round's unit comes back before the leader's last one.
            super().submit(unit)
            self.waiting.insert(0, self.waiting.pop())

    backend = FailsLater(losses, slots=8)
    results = measure(backend, 3, Settings(400, 400, racing=True), ignore)
    assert any(
        what == "collect" and unit.tasks == (1,) and second & set(unit.images.tolist()) for what, unit in backend.events
    )
    assert (results[0].loss, results[0].error, results[0].dropped_at) == (0.0, "", None)
    assert (results[1].loss, results[1].error, results[1].dropped_at) == (pytest.approx(5.0), "", 1)


@pytest.mark.parametrize("racing", [True, False])
def test_each_result_is_told_once_when_nothing_more_will_be_known_of_it(racing):
    losses = matrix(12, 600)
    heard, backend = {}, FakeBackend(losses, 7, 0)

    def hear(position, result):
        assert position not in heard
        heard[position] = result

    results = measure(backend, 13, Settings(600, 64, racing=racing), hear)
    assert heard == dict(enumerate(results))


def test_the_share_that_is_done_rises_to_one_in_an_exhaustive_iteration():
    shares = []
    backend = FakeBackend(matrix(12, 600), 7, 0)
    measure(backend, 13, Settings(600, 64), ignore, shares.append)
    assert len(shares) == len(backend.submitted) > 10
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0
    assert shares[0] == pytest.approx(1 / len(shares))


@pytest.mark.parametrize("racing", [True, False])
def test_one_candidate_or_none_needs_no_race(racing):
    losses = matrix(1, 300)
    for rows in (losses, losses[-1:]):
        results = measure(FakeBackend(rows, 2, 0), len(rows), Settings(300, 64, racing=racing), ignore)
        assert [(result.images, result.dropped_at) for result in results] == [(300, None)] * len(rows)
        for result, row in zip(results, rows, strict=True):
            assert result.loss == pytest.approx(row.astype(np.float64).mean(), rel=1e-12)


def test_fewer_images_than_a_first_round_are_all_measured_at_once():
    losses = matrix(5, 40)
    raced = results_of(losses, True, 2, 0)
    whole = results_of(losses, False, 2, 0)
    assert [item[1:] for item in raced] == [(40, None)] * 6
    for a, b in zip(raced, whole, strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-12)


def test_five_hundred_candidates_on_sixty_four_hands_stay_a_small_job():
    losses = matrix(500, 5000)
    for racing, most in ((True, 2500), (False, 64 * UNITS_PER_SLOT + 5000 // 250)):
        backend = FakeBackend(losses, 64, 0)
        results = measure(backend, 501, Settings(5000, 250, racing=racing), ignore)
        assert len(backend.submitted) <= most
        first = min((k for k in range(500) if results[k].dropped_at is None), key=lambda k: results[k].loss)
        assert first == int(losses[:-1].mean(1).argmin())


class TwoPrecisions(FakeBackend):
    """Fast losses are off by up to 0.001, differently for each candidate and image."""

    def __init__(self, losses, slots=1, seed=None, copied=()):
        super().__init__(losses, slots, seed)
        self._error = np.random.default_rng(9).uniform(-0.001, 0.001, losses.shape).astype(np.float32)
        self._copied = copied

    def cost(self, task):
        cost = super().cost(task)
        return Cost(cost.shared, cost.own, "a reason") if task in self._copied else cost

    def collect(self):
        unit, found = super().collect()
        values = found.values + self._error[np.ix_(unit.tasks, unit.images)] * unit.fast
        return unit, Losses(values, found.errors, found.seconds)


def test_a_race_in_a_fast_precision_does_not_depend_on_workers_and_chooses_as_in_full():
    losses = matrix(25, 900)
    settings = Settings(900, 64, racing=True, fast=True, seed=3)
    found = []
    for slots, order in ((1, None), (7, 0), (64, 1)):
        backend = TwoPrecisions(losses, slots, order)
        results = measure(backend, 26, settings, ignore)
        found.append([(result.loss, result.images, result.dropped_at) for result in results])
        pairs = [
            (unit.fast, *pair)
            for unit in backend.submitted
            for pair in itertools.product(unit.tasks, unit.images.tolist())
        ]
        assert len(pairs) == len(set(pairs))
        assert backend.waiting == []
    assert found[0] == found[1] == found[2]
    kept = [task for task in range(25) if found[0][task][2] is None]
    assert min(kept, key=lambda task: found[0][task][0]) == int(losses[:-1].mean(1).argmin())
    assert found[0][25][0] == pytest.approx(losses[-1].mean(), abs=5e-4)
    in_full = sum(len(unit.tasks) * len(unit.images) for unit in backend.submitted if not unit.fast)
    assert 0 < in_full < 0.1 * losses.size


@pytest.mark.parametrize("settings", [{"racing": True}, {"racing": False}])
def test_what_is_measured_on_copies_or_on_all_images_is_in_full_precision(settings):
    losses = matrix(5, 300)
    backend = TwoPrecisions(losses, copied=(3,) if settings["racing"] else ())
    measure(backend, 6, Settings(300, 64, fast=True, **settings), ignore)
    assert not any(unit.fast for unit in backend.submitted)
