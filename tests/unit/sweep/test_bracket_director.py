"""The director of `--max-drop` on a trajectory whose trials are answered by hand."""

import dataclasses

import pytest

from laasp_ray.errors import SearchError
from laasp_ray.recipes import recipe
from laasp_ray.records import Metrics
from laasp_ray.sweep import directors
from laasp_ray.sweep.directors import BELOW, NEEDLESS, TRAJECTORY, BracketDirector
from laasp_ray.sweep.goals import MaxDrop
from laasp_ray.sweep.trials import Outcome

DEEPEST_WITHIN = 13
"""Of 20 iterations, each of which costs a tenth of a point."""


def top1_of(iteration):
    return 92.0 - 0.1 * iteration


@pytest.fixture
def trajectory(monkeypatch):
    """A trajectory of 20 iterations that has been pruned already, of which nothing is on a disk."""
    began = set()
    monkeypatch.setattr(directors, "has_pruned", lambda run: False)
    monkeypatch.setattr(directors, "has_begun", lambda run: run.name in began)
    monkeypatch.setattr(directors, "outcome_of", lambda run: Outcome())
    monkeypatch.setattr(directors, "fork", lambda source, run: began.add(run.name))
    monkeypatch.setattr(directors, "base_metrics", lambda run: Metrics(loss=0.3, top1=0.92, top5=1.0, images=10_000))
    monkeypatch.setattr(directors, "reductions_of", lambda run: [0.02 * number for number in range(1, 21)])
    return dataclasses.replace(recipe("resnet20_cifar10"), name="sweep", storage="nowhere")


def director_of(config, slots=2, points=1.35, earlier=(), alone=None):
    recorded = []
    cluster = alone or config.cluster
    made = BracketDirector(config, MaxDrop(points), slots, cluster, lambda *said: recorded.append(said), dict(earlier))
    return made, recorded


def test_the_deepest_within_the_drop_is_found_with_few_trials(trajectory):
    for slots, most in ((1, 5), (2, 6), (3, 9)):
        director, recorded = director_of(trajectory, slots)
        first = director.next()
        assert (first.name, first.only_prunes, first.config.train.keep_checkpoints) == (TRAJECTORY, True, True)
        assert director.next() is None and not director.is_done
        director.ended(TRAJECTORY, Outcome())
        while not director.is_done:
            running = []
            while (trial := director.next()) is not None:
                running.append(trial)
            assert 1 <= len(running) <= slots
            for trial in running:
                number = int(trial.name[-3:])
                assert trial.config.prune.flops_reduction == 0.02 * number and not trial.config.train.keep_checkpoints
                director.ended(trial.name, Outcome(score=top1_of(number)))
        assert director.bounds.met == DEEPEST_WITHIN
        assert len(director.trials) <= most and len(recorded) == len(director.trials) + 1
        assert director.bar == pytest.approx(90.65)


def test_several_at_once_cut_what_is_unknown_evenly(trajectory):
    """Of 20 iterations 5, 10 and 16 leave 0 to 5, 5 to 10, 10 to 16 and 16 to 21."""
    director, _ = director_of(trajectory, slots=3)
    director.next()
    director.ended(TRAJECTORY, Outcome())
    running = [director.next().name for _ in range(3)]
    assert running == ["iteration-005", "iteration-010", "iteration-016"] and director.next() is None
    # What is handed out after a result takes it into account: 10 to 16 is left, without what runs.
    director.ended("iteration-016", Outcome(score=top1_of(16)))
    director.ended("iteration-010", Outcome(score=top1_of(10)))
    assert [director.next().name for _ in range(2)] == ["iteration-012", "iteration-014"]


def test_nothing_runs_beside_the_trajectory(trajectory):
    alone = dataclasses.replace(trajectory.cluster, search_workers=7)
    director, _ = director_of(trajectory, alone=alone)
    assert director.next().config.cluster == alone
    director.ended(TRAJECTORY, Outcome())
    assert director.next().config.cluster == trajectory.cluster


def test_a_trial_is_stopped_when_it_cannot_be_the_answer_any_more(trajectory):
    director, _ = director_of(trajectory, slots=2)
    director.next()
    director.ended(TRAJECTORY, Outcome())
    shallow, deep = director.next(), director.next()
    assert director.stop_reason(deep.name, [10.0]) == ""  # nothing is known of what epochs gain
    director.ended(shallow.name, Outcome(score=top1_of(7), curve=(88.0, 91.3)))
    assert director.stop_reason(deep.name, [86.7]) == BELOW  # 86.7 + 3.3 + 0.5 is less than 90.65
    assert director.stop_reason(deep.name, [86.9]) == ""
    director.ended(deep.name, Outcome(stopped=BELOW, curve=(87.0,)))
    assert director.bounds.missed == 14
    following = director.next(), director.next()
    assert all(7 < int(trial.name[-3:]) < 14 for trial in following)
    deeper = max(following, key=lambda trial: trial.name)
    director.ended(deeper.name, Outcome(score=91.0))
    other = min(following, key=lambda trial: trial.name)
    assert director.stop_reason(other.name, [91.0]) == NEEDLESS
    assert director.stop_reason(TRAJECTORY, [1.0]) == ""


def test_a_sweep_that_was_cut_off_begins_with_what_is_known(trajectory, monkeypatch):
    monkeypatch.setattr(directors, "has_pruned", lambda run: True)
    known = {7: Outcome(score=91.3), 14: Outcome(stopped=BELOW), 10: Outcome(stopped=NEEDLESS)}
    monkeypatch.setattr(directors, "has_begun", lambda run: int(run.name[-3:]) in known)
    earlier = {f"iteration-{number:03d}": outcome for number, outcome in known.items()}
    director, _ = director_of(trajectory, slots=1, earlier=earlier)
    assert (director.bounds.met, director.bounds.missed) == (7, 14)
    assert 7 < int(director.next().name[-3:]) < 14
    failed = {"iteration-007": Outcome(error="lost"), "iteration-014": Outcome(stopped=BELOW)}
    director, _ = director_of(trajectory, slots=1, earlier=failed)  # what failed is tried again
    assert (director.bounds.met, director.bounds.missed) == (0, 14)


def test_what_others_need_ends_the_sweep_with_its_error(trajectory):
    director, recorded = director_of(trajectory)
    director.next()
    with pytest.raises(SearchError, match="the trajectory of the sweep ended: no room"):
        director.ended(TRAJECTORY, Outcome(error="no room"))
    assert recorded == [(TRAJECTORY, Outcome(error="no room"))]
