import math

import pytest

from laasp_ray.config import TARGETS
from laasp_ray.errors import SearchError
from laasp_ray.records import (
    Candidate,
    CandidateLoss,
    Decision,
    MeasuredLoss,
    Ranking,
    RunState,
    to_json,
)
from laasp_ray.search.policy import choose, decide


def entry(layer, loss, criterion="l1", also=(), **more):
    candidate = Candidate(layer=layer, criterion=criterion, filters=(0, 2), flops_reduction=0.1, also=also)
    return CandidateLoss(candidate=candidate, measured=MeasuredLoss(loss, 10, **more))


def test_ranking_sorts_by_loss_and_ties_keep_the_order_of_proposal():
    ranking = Ranking([entry("a", 0.5), entry("b", 0.3), entry("c", 0.3), entry("d", 0.4)])
    assert [item.layer for item in ranking] == ["b", "c", "d", "a"]


def test_non_finite_losses_come_last_and_are_never_chosen():
    ranking = Ranking([entry("a", math.nan), entry("b", -math.inf), entry("c", 9.0), entry("d", math.inf)])
    assert [item.layer for item in ranking] == ["c", "a", "b", "d"]
    assert choose(ranking).layer == "c"


def test_those_that_a_race_dropped_come_after_the_others_and_before_those_without_a_loss():
    ranking = Ranking(
        [
            entry("dropped, low by luck", 0.1, dropped_at=1),
            entry("dropped late", 0.4, dropped_at=7),
            entry("diverged", math.inf, dropped_at=1),
            entry("second", 0.5),
            entry("failed", math.nan, error="RuntimeError: broken"),
            entry("best", 0.3),
            entry("dropped, a tie", 0.1, dropped_at=3),
        ]
    )
    assert [item.layer for item in ranking] == [
        "best",
        "second",
        "dropped, low by luck",
        "dropped, a tie",
        "dropped late",
        "failed",
        "diverged",
    ]
    assert choose(ranking).layer == "best"
    assert ranking.rank_of("dropped late", "l1") == 5


def test_when_all_failed_the_error_names_the_first_and_says_why():
    failed = [entry("a", math.nan, error="ValueError: odd"), entry("b", math.nan, error="RuntimeError: broken")]
    with pytest.raises(
        SearchError, match=r"no candidate's loss could be measured; a by l1 \(2 filters\): ValueError: odd"
    ):
        choose(Ranking(failed))


def test_no_finite_loss_is_an_error():
    with pytest.raises(SearchError, match="none of the 2 candidates has a finite loss"):
        choose(Ranking([entry("a", math.nan), entry("b", math.inf)]))


def test_rank_of_counts_from_one_and_knows_shared_proposals():
    ranking = Ranking([entry("a", 0.5), entry("b", 0.3, also=(("b", "cosine"),))])
    assert (ranking.rank_of("b", "cosine"), ranking.rank_of("a", "l1")) == (1, 2)
    with pytest.raises(KeyError, match="no candidate of layer 'a' by 'cosine'"):
        ranking.rank_of("a", "cosine")


def test_the_decision_of_a_ranking_is_its_first():
    decision = decide(Ranking([entry("b", 0.25, also=(("b", "l2"),))]), iteration=3, loss_before=0.2)
    assert decision == Decision(
        iteration=3,
        layer="b",
        criterion="l1",
        filters=(0, 2),
        loss=0.25,
        loss_before=0.2,
        flops_reduction=0.1,
        also=(("b", "l2"),),
    )


def test_a_state_tells_what_is_reached_of_every_target():
    state = RunState(flops_reduction=0.1, parameters_reduction=0.2, latency_reduction=0.3)
    assert state.reached == {"FLOPs": 0.1, "parameters": 0.2, "latency": 0.3}
    assert {of: getattr(state, key) for of, key in TARGETS.items()} == state.reached


def test_non_finite_floats_have_a_json_form():
    assert to_json({"loss": math.nan, "best": math.inf}) == {"loss": "nan", "best": "inf"}
