"""The race: how images are stratified and sampled, who is dropped, and how often the wrong one is."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from laasp_ray.config import SearchConfig
from laasp_ray.errors import ConfigError
from laasp_ray.search import stratified
from laasp_ray.search.racing import Race
from laasp_ray.search.stratified import Sample, strata_of


def run(base, losses, **settings):
    """A race over the rows of `losses`, to its end."""
    race = Race(base, len(losses), **settings)
    while requests := race.requests():
        for request in requests:
            race.finish(request, losses[np.ix_(request.candidates, request.images)])
    return race


def next_of(race, kind):
    """The race's only request, which is of this kind."""
    (request,) = race.requests()
    assert request.kind == kind
    return request


def finish_leader(race, candidate, losses):
    """Measures the leader, which has to be this one, on the rest of all images, of which it has these losses."""
    request = next_of(race, "whole")
    assert request.candidates == (candidate,)
    return race.finish(request, losses[request.images][None])


def hard_and_easy(draw, images):
    """Losses of an unpruned network: a quarter of the images is hard."""
    return np.where(draw.random(images) < 0.25, draw.gamma(1.0, 0.8, images), draw.gamma(0.5, 0.02, images))


# --- strata ---------------------------------------------------------------------------------------------------------


def test_equal_losses_give_strata_of_equal_size():
    for loss in (0.0, 0.7, math.nan, math.inf):
        strata = strata_of(np.full(4000, loss))
        assert [len(stratum) for stratum in strata] == [250] * 16
        assert np.concatenate(strata).tolist() == list(range(4000))


def test_strata_hold_equal_weights_the_easiest_first(monkeypatch):
    monkeypatch.setattr(stratified, "STRATA", 8)
    monkeypatch.setattr(stratified, "LEAST_WEIGHT", 0.005)
    # Weights 1 - exp(-loss): of loss ln 2 one half, of loss 0 the least weight, 0.005, of NaN and inf 1.
    # 400 easy images weigh 2, 8 of one half 4, and 2 without a finite loss 2: 8 in all, 1 in each of 8 strata.
    base = np.zeros(410)
    base[[7, 50, 90, 130, 200, 260, 300, 409]] = math.log(2)
    base[[3, 5]] = math.inf, math.nan
    strata = strata_of(base)
    assert [len(stratum) for stratum in strata] == [200, 200, 2, 2, 2, 2, 1, 1]
    assert [stratum.tolist() for stratum in strata[2:]] == [[7, 50], [90, 130], [200, 260], [300, 409], [3], [5]]
    assert 0.0 == base[strata[0]].max() == base[strata[1]].max()


def test_easy_images_are_sorted_by_loss_too_though_they_weigh_the_same():
    base = np.linspace(0, 0.004, 80)[::-1]
    assert np.concatenate(strata_of(base)).tolist() == list(range(79, -1, -1))


def test_fewer_images_than_strata_are_a_stratum_each():
    assert [stratum.tolist() for stratum in strata_of(np.array([2.0, 2.0, 2.0]))] == [[0], [1], [2]]
    assert [stratum.tolist() for stratum in strata_of(np.array([0.0]))] == [[0]]


# --- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 2, 9, 95, 96, 97, 1000, 4001])
def test_the_rounds_cover_every_image_once(images):
    race = Race(hard_and_easy(np.random.default_rng(images), images), 5)
    assert sorted(np.concatenate(race.sample.rounds).tolist()) == list(range(images))
    assert all(len(sample) for sample in race.sample.rounds)


def test_rounds_grow_and_the_first_is_small():
    known = np.cumsum([len(sample) for sample in Sample(hard_and_easy(np.random.default_rng(0), 5000), 0).rounds])
    assert stratified.FIRST_LOOK <= known[0] <= stratified.FIRST_LOOK + stratified.STRATA
    # A stratum takes whole images, at most one too many.
    limits = stratified.GROWTH * known + stratified.STRATA
    assert all(after <= limit for after, limit in zip(known[1:], limits, strict=False))


def test_hard_strata_are_sampled_most():
    base = hard_and_easy(np.random.default_rng(0), 4000)
    samples = Sample(base, 0).rounds
    strata = strata_of(base)
    shares = [np.isin(stratum, samples[0]).mean() for stratum in strata]
    assert shares[-1] > 5 * shares[0]
    by_size = [shares[k] for k in np.argsort([len(stratum) for stratum in strata], kind="stable")]
    assert all(after < before + 0.01 for before, after in itertools.pairwise(by_size))  # numbers of images are whole


def test_every_stratum_shows_a_variance_or_is_known():
    for seed in range(20):  # 30,000 easy images and a few that weigh as much as they
        draw = np.random.default_rng(seed)
        base = np.concatenate([np.zeros(30_000), draw.gamma(2.0, 1.0, draw.integers(2, 40))])
        first = Sample(base, seed).rounds[0]
        for stratum in strata_of(base):
            assert np.isin(stratum, first).sum() >= min(len(stratum), 2)


def test_samples_follow_from_the_seed():
    base = hard_and_easy(np.random.default_rng(0), 1000)
    first, again, other = (Sample(base, seed).rounds for seed in (1, 1, 2))
    assert [sample.tolist() for sample in first] == [sample.tolist() for sample in again]
    assert set(first[0].tolist()) != set(other[0].tolist())


# --- decisions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_strata(monkeypatch):
    """10 easy images, of which the first round has 6, and 2 hard ones, of which it has both; then the rest."""
    monkeypatch.setattr(stratified, "STRATA", 2)
    monkeypatch.setattr(stratified, "LEAST_WEIGHT", 0.005)
    monkeypatch.setattr(stratified, "FIRST_LOOK", 8)
    monkeypatch.setattr(stratified, "LEAST_IMAGES", 6)
    base = np.zeros(12)
    base[[10, 11]] = 0.0251  # each weighs five easy ones: 10 * 0.005 = 0.05 = 2 * 0.0248 and a little
    assert [stratum.tolist() for stratum in strata_of(base)] == [list(range(10)), [10, 11]]
    return base


def drop_at_first_round(base, gap, error):
    """Whether B falls, which loses `gap` more than A on the hard images, and `gap` +- 0.1 on the easy ones seen. A's
    losses are the unpruned network's, and it is measured on all images.
    """
    race = Race(base, 2, error=error)
    sample = race.sample.rounds[0]
    assert sorted(sample[sample >= 10].tolist()) == [10, 11]
    assert len(sample) == 8
    easy = np.flatnonzero(sample < 10)
    losses = base[sample] + np.zeros((2, 8))
    losses[1] += gap
    losses[1, easy[::2]] += 0.1
    losses[1, easy[1::2]] -= 0.1
    assert race.finish(next_of(race, "round"), losses) == []
    own = base.mean()
    assert race.estimates == pytest.approx([own, own + gap])  # 10/12 * gap + 2/12 * gap
    assert race.images.tolist() == [8, 8]
    dropped = finish_leader(race, 0, base)
    assert race.whole == {0: pytest.approx(own)}
    assert race.images.tolist() == [12, 8]
    return dropped == [1]


def test_one_is_dropped_just_beyond_the_limit_and_not_just_within(two_strata):
    # The hard stratum is known. In the easy one six differences gap +- 0.1: variance 6 * 0.01 / 5 = 0.012, pooled with
    # 16 times the median of that and A's 0, 0.006: (5 * 0.012 + 16 * 0.006) / 21 = 0.052 / 7. On three of them B is
    # better by 0.1 - gap, and its losses are negative: a part of that square, over 6; times (10/12)^2 (1 - 6/10) / 6.
    # Two rounds.
    for error in (0.01, 0.2):
        quantile = NormalDist().inv_cdf(1 - error / 2)

        def limit(gap, quantile=quantile):
            spread = 0.052 / 7 + stratified.UNSEEN * max(0.1 - gap, 0) ** 2 / 6
            return quantile * math.sqrt((10 / 12) ** 2 * 0.4 * spread / 6)

        within, beyond = 0.0, 1.0
        while beyond - within > 1e-9:
            middle = (within + beyond) / 2
            within, beyond = (middle, beyond) if middle <= limit(middle) else (within, middle)
        assert not drop_at_first_round(two_strata, within - 1e-6, error)
        assert drop_at_first_round(two_strata, beyond + 1e-6, error)


def test_small_samples_are_pooled_with_the_median_of_all(two_strata, monkeypatch):
    # Candidate 1 differs from 0 by a constant; 2 and 3 by +-0.1 and +-0.3 on the six easy images: variances 0, 0, 0.012
    # and 0.108. The median is 0.006; with 5 degrees of freedom of its own and 16 of the median, 1 has 16/21 of it.
    monkeypatch.setattr(stratified, "UNSEEN", 0.0)
    spread = 16 / 21 * 0.006
    limit = NormalDist().inv_cdf(1 - 0.01 / (3 * 2)) * math.sqrt((10 / 12) ** 2 * 0.4 * spread / 6)
    for gap, falls in ((limit - 1e-6, False), (limit + 1e-6, True)):
        race = Race(two_strata, 4)
        own = two_strata[race.sample.rounds[0]]
        sign = np.where(np.arange(8) % 2, 1.0, -1.0) * (race.sample.rounds[0] < 10)
        assert sign.sum() == 0
        differences = np.stack([np.zeros(8), np.full(8, gap), 0.2 + 0.1 * sign, 0.2 + 0.3 * sign])
        race.finish(next_of(race, "round"), own + differences)
        assert (1 in finish_leader(race, 0, two_strata)) is falls


def test_what_may_be_better_where_no_image_was_seen_is_bounded_by_the_loss_without_a_prune(two_strata):
    # B is better by 0.02 on a hard image. In the easy stratum no loss can be lower than the unpruned network's 0, so
    # that there is no doubt, and B falls; if losses may be negative, 0.02 * 0.02^2 / 6 counts for each of 6 images.
    for lowest, falls in ((0.0, True), (-0.006, False)):
        race = Race(two_strata, 2)
        sample = race.sample.rounds[0]
        losses = np.tile(two_strata[sample], (2, 1))
        losses[1, sample == 11] += 0.02 + 1e-6
        losses[1, sample == 10] -= 0.02
        losses[:, sample == 10] += lowest
        race.finish(next_of(race, "round"), losses)
        whole = two_strata.copy()
        whole[10] += lowest
        assert finish_leader(race, 0, whole) == ([1] if falls else [])


def test_nothing_is_dropped_before_the_leader_is_measured_on_all_images():
    base = hard_and_easy(np.random.default_rng(0), 2000)
    losses = np.stack([base, base + 5.0, base + 7.0])
    race = Race(base, 3)
    request = next_of(race, "round")
    assert race.finish(request, losses[:, request.images]) == []
    assert finish_leader(race, 0, losses[0]) == [1, 2]
    assert race.requests() == []
    assert (race.survivors, race.fell) == ([0], {1: 1, 2: 1})


def test_one_that_is_worse_only_where_no_sample_looked_is_not_chosen():
    """A looks better than B by 0.05, but loses 400 on the one image that no round has before the leader is known."""
    base = np.full(3000, 0.01)
    race = Race(base, 2, seed=1)
    unseen = race.sample.rounds[4][0]
    losses = np.stack([base + 0.05, base + 0.1])
    losses[0, unseen] += 400  # 0.13 of the mean
    request = next_of(race, "round")
    race.finish(request, losses[:, request.images])
    assert finish_leader(race, 0, losses[0]) == []
    assert finish_leader(race, 1, losses[1]) == []
    assert (race.requests(), race.choice) == ([], 1)


def test_a_loss_that_is_not_finite_drops_at_once():
    base = hard_and_easy(np.random.default_rng(0), 1000)
    for bad in (math.nan, math.inf):
        race = Race(base, 3)
        losses = np.zeros((3, len(race.sample.rounds[0])))
        losses[1, 17] = bad
        assert race.finish(next_of(race, "round"), losses) == [1]
        assert (race.survivors, race.fell, race.images.tolist()) == ([0, 2], {1: 1}, [len(race.sample.rounds[0])] * 3)
        assert not math.isfinite(race.estimates[1])


def test_all_not_finite_ends_the_race_without_a_winner():
    race = run(np.zeros(500), np.full((3, 500), math.nan))
    assert (race.survivors, race.rounds, race.fell) == ([], 1, {0: 1, 1: 1, 2: 1})


def test_a_loss_that_is_not_finite_at_the_last_image_is_not_chosen():
    base = hard_and_easy(np.random.default_rng(0), 600)
    losses = np.stack([base, base])
    losses[0, Sample(base, 0).rounds[-1][-1]] = math.nan
    race = run(base, losses)
    assert race.survivors == [1]
    assert not math.isfinite(race.estimates[0])


@pytest.mark.parametrize("candidates", [2, 3, 7, 50])
def test_identical_candidates_all_stay_with_the_mean_over_all_images(candidates):
    draw = np.random.default_rng(candidates)
    base = hard_and_easy(draw, 1500)
    row = base + draw.normal(0, 0.3, 1500)
    race = run(base, np.tile(row, (candidates, 1)), seed=candidates)
    assert race.survivors == list(range(candidates))
    assert set(race.images.tolist()) == {1500}
    assert len(set(race.estimates.tolist())) == 1  # to the last bit: the first wins, as in an exhaustive search
    assert race.estimates[0] == row.mean()


def test_a_dead_heat_among_others_goes_to_the_first():
    for seed in range(10):
        draw = np.random.default_rng(seed)
        base = hard_and_easy(draw, 1500)
        losses = base + draw.normal(0, 0.3, (30, 1500)) * (0.05 + base) + draw.uniform(0.05, 0.5, (30, 1))
        losses[[4, 11, 29]] = base + 0.01
        race = run(base, losses, seed=seed)
        assert set(race.survivors) <= {4, 11, 29}
        assert race.choice == 4


def test_estimates_are_unbiased():
    draw = np.random.default_rng(0)
    base = hard_and_easy(draw, 2000)
    row = base * draw.uniform(0.5, 2.0, 2000)
    first = []
    for seed in range(200):
        race = Race(base, 1, seed=seed)
        race.finish(next_of(race, "round"), row[race.sample.rounds[0]][None])
        first.append(race.estimates[0])
    assert abs(np.mean(first) - row.mean()) < 4 * np.std(first) / math.sqrt(200)
    # Strata help: an unstratified sample of the same size would scatter several times as much.
    assert np.std(first) < row.std() / math.sqrt(len(race.sample.rounds[0])) / 2


# --- agreement ------------------------------------------------------------------------------------------------------


def heavy_tails(draw, candidates, images):
    base = hard_and_easy(draw, images)
    apart = draw.uniform(0, 0.05, (candidates, 1))
    return base, base + apart + 0.3 * (0.02 + base) * draw.standard_t(3, (candidates, images))


def rare_jumps(draw, candidates, images):
    """An image in 300 jumps by 3, easy or not, for one half of the candidates."""
    base = hard_and_easy(draw, images)
    losses = base + draw.uniform(0, 0.05, (candidates, 1)) + draw.normal(0, 0.3, (candidates, images)) * (0.1 + base)
    hit = (draw.random((candidates, images)) < 1 / 300) & (draw.random((candidates, 1)) < 0.5)
    return base, losses + 3 * hit


def near_ties(draw, candidates, images):
    """The first four within a standard error or so of each other."""
    base = hard_and_easy(draw, images)
    apart = np.sort(draw.uniform(0, 0.3, (candidates, 1)), 0)
    apart[:4] = draw.uniform(0, 0.006, (4, 1))
    return base, base + apart + draw.normal(0, 0.3, (candidates, images)) * (0.05 + base)


def skewed(draw, candidates, images):
    base = hard_and_easy(draw, images)
    tails = draw.lognormal(0, 1.5, (candidates, images)) - math.exp(1.125) * draw.uniform(0, 1, (candidates, 1))
    return base, base + 0.02 * (0.05 + base) * tails


@pytest.mark.parametrize("make", [heavy_tails, rare_jumps, near_ties, skewed])
def test_races_end_with_the_exhaustive_choice(make):
    wrong, regrets, evaluations = 0, [], 0
    for seed in range(200):
        base, losses = make(np.random.default_rng(seed), 10, 1000)
        race = run(base, losses, seed=seed)
        means = losses.mean(1)
        wrong += race.choice != means.argmin()
        regrets.append(means[race.choice] - means.min())
        evaluations += race.images.sum() / losses.size
    assert wrong <= 2
    assert max(regrets) < 0.005
    assert evaluations / 200 < 0.6


def equal_means(draw, candidates, images):
    """Candidates whose means are equal, but for the first's, which is least by next to nothing."""
    base = hard_and_easy(draw, images)
    losses = base + draw.normal(0, 0.3, (candidates, images)) * (0.05 + base)
    losses -= losses.mean(1, keepdims=True)
    losses[0] -= 1e-9
    return base, losses


def share_that_drops_the_best(candidates, error, races):
    wrong = 0
    for seed in range(races):
        base, losses = equal_means(np.random.default_rng(seed), candidates, 400)
        wrong += 0 not in run(base, losses, error=error, seed=seed).survivors
    return wrong / races


@pytest.mark.parametrize("candidates", [2, 6])
def test_the_best_of_equals_is_dropped_less_often_than_the_error_allows(candidates):
    assert share_that_drops_the_best(candidates, 0.01, 300) < 0.01


def test_the_bound_is_not_vacuous():
    assert 0.005 < share_that_drops_the_best(2, 0.9, 300) < 0.9


def test_within_the_margin_the_race_ends_sooner():
    # The two differ by 0.002 on average, which the noise of 0.1 an image hides until nearly all images are used.
    base = np.linspace(0.1, 2, 2000)
    losses = np.stack([base + 0.002, base]) + np.random.default_rng(0).normal(0, 0.1, (2, 2000))
    images = {}
    for margin in (0.0, 0.02):
        race = run(base, losses, margin=margin)
        images[margin] = sorted(race.images.tolist())
        assert race.survivors  # the best so far never falls
    assert images[0.02][0] < images[0.0][0]
    assert images[0.02][1] == images[0.0][1] == 2000


def test_a_margin_is_a_share():
    with pytest.raises(ConfigError, match=r"search\.racing_margin is 1\.5, must be a share"):
        SearchConfig(racing_margin=1.5)


# --- two precisions -------------------------------------------------------------------------------------------------


def run_fast(base, losses, rounded, **settings):
    """A race over `losses` (candidates, n) in full and `rounded` in the fast precision, as is `base`, with what it
    measured in full: (candidate, image) once each.
    """
    race, in_full = Race(base, len(losses), fast=True, **settings), []
    while requests := race.requests():
        for request in requests:
            full = request.kind == "full"
            in_full += itertools.product(request.candidates, request.images.tolist()) if full else []
            race.finish(request, (losses if full else rounded)[np.ix_(request.candidates, request.images)])
    assert len(in_full) == len(set(in_full))
    return race, in_full


def rounded_off(draw, base, losses, size):
    """Fast losses: each candidate's are off by `size` on average, another way for each, more on hard images."""
    bias = size * np.linspace(1, -1, len(losses))[:, None]
    return losses + (bias + draw.normal(0, 3 * size, losses.shape)) * (0.2 + base) / (0.2 + base).mean()


def test_a_fast_precision_that_errs_by_more_than_candidates_differ_still_gives_the_exhaustive_choice():
    # The first is best by 0.002, and its fast losses are worst by 0.01: in the fast precision it is among the last.
    wrong, fast_choice, in_full = 0, 0, 0
    for seed in range(40):
        draw = np.random.default_rng(seed)
        base = hard_and_easy(draw, 1000)
        losses = base + 0.002 * np.arange(10)[:, None] + draw.normal(0, 0.05, (10, 1000)) * (0.05 + base)
        rounded = rounded_off(draw, base, losses, 0.01)
        race, full = run_fast(base, losses, rounded, seed=seed)
        wrong += race.choice != losses.mean(1).argmin()
        fast_choice += rounded.mean(1).argmin() == losses.mean(1).argmin()
        in_full += len(full)
    assert fast_choice == 0
    assert wrong <= 1
    assert in_full / (40 * losses.size) < 0.9


def test_candidates_far_apart_are_not_measured_in_full():
    draw = np.random.default_rng(0)
    base = hard_and_easy(draw, 2000)
    losses = base + 0.2 * np.arange(8)[:, None] + draw.normal(0, 0.05, (8, 2000)) * (0.05 + base)
    race, full = run_fast(base, losses, rounded_off(draw, base, losses, 1e-4))
    assert {candidate for candidate, _ in full} == {0} == {race.choice}
    assert sorted(image for _, image in full) == sorted(race.sample.rounds[0].tolist())


def test_the_loss_of_the_choice_is_that_in_full_precision():
    # All fast losses are too high by exactly 0.125: the correction is exact, from however few images.
    base = hard_and_easy(np.random.default_rng(0), 1000).astype(np.float32).astype(float)
    losses = base + 0.5 * np.arange(4)[:, None]
    race, _ = run_fast(base + 0.125, losses, losses + 0.125)
    assert race.choice == 0
    assert race.loss(0) == pytest.approx(base.mean(), abs=1e-6)
    assert race.estimates[0] == pytest.approx(base.mean() + 0.125)


def test_near_equals_in_two_precisions_are_all_measured_in_full():
    draw = np.random.default_rng(0)
    base = hard_and_easy(draw, 300)
    losses = base + 1e-6 * np.arange(3)[:, None]
    race, full = run_fast(base, losses, rounded_off(draw, base, losses, 0.01))
    assert race.choice == 0
    assert len(full) > 2.5 * 300


def test_a_loss_that_is_not_finite_in_full_drops_at_once():
    base = hard_and_easy(np.random.default_rng(0), 1000)
    losses = base + 0.3 * np.arange(3)[:, None]
    full = losses.copy()
    full[0, Sample(base, 0).rounds[0][5]] = math.nan
    race, _ = run_fast(base, full, losses)
    assert (race.choice, 0 in race.survivors, 0 in race.fell) == (1, False, True)
