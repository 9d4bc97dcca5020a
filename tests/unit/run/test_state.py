"""The state machine of a run, event by event, without anything being trained."""

import dataclasses
import math

import pytest
from run_events import decision, epoch_done, iteration_done, phase_done

from laasp_ray.pruning.plan import Plan
from laasp_ray.recipes import recipe
from laasp_ray.run.events import CalibrationDrawn, Exhausted, ImageExcluded
from laasp_ray.run.state import advance, fold, initial_state, next_training_phase


def config(*, target=0.5, fine_tune_every=0.02, fine_tune_epochs=2, epochs=6, prune_epoch=3, pretrained=None):
    base = recipe("resnet20_cifar10")
    return dataclasses.replace(
        base,
        prune=dataclasses.replace(
            base.prune, flops_reduction=target, fine_tune_every=fine_tune_every, fine_tune_epochs=fine_tune_epochs
        ),
        train=dataclasses.replace(
            base.train, epochs=epochs, prune_epoch=prune_epoch, drop_epochs=(4,), pretrained=pretrained
        ),
    )


def epoch(checkpoint):
    return epoch_done(checkpoint=checkpoint)


def iteration(reduction, kept=(0, 1), **changes):
    step = Plan(
        tensors={"conv.weight": {0: (kept,)}}, attributes={"conv": {"out_channels": len(kept)}}, layers={"conv": kept}
    )
    return iteration_done(decision(flops_reduction=reduction), step=step.to_json(), **changes)


TRAINED = phase_done()


def test_a_run_begins_with_training_unless_it_is_given_trained_weights():
    assert initial_state(config()).phase == "train"
    assert initial_state(config(prune_epoch=0)).phase == "prune"
    assert initial_state(config(pretrained="weights.safetensors")).phase == "prune"


def test_first_training_phase_trains_up_to_the_prune_epoch():
    training_phase = next_training_phase(initial_state(config()), config())
    assert [(plan.epoch, plan.data_epoch) for plan in training_phase.epochs] == [(0, 0), (1, 1), (2, 2)]
    assert (training_phase.phase, training_phase.number, training_phase.done) == ("train", 0, 0)


def test_a_training_phase_that_was_cut_off_goes_on_after_its_last_epoch():
    state = fold([epoch("000000"), epoch("000001")], config())
    training_phase = next_training_phase(state, config())
    assert (state.checkpoint, state.epochs_trained, training_phase.done) == ("000001", 2, 2)
    assert [plan.data_epoch for plan in training_phase.epochs] == [0, 1, 2]


def test_fine_tune_comes_when_enough_has_gone_and_trains_at_the_prune_epochs_rate():
    state = fold([epoch("a"), epoch("b"), epoch("c"), TRAINED], config())
    assert state.phase == "prune"
    state = advance(state, iteration(0.01), config())
    assert state.phase == "prune"
    state = advance(state, iteration(0.0201), config())
    assert state.phase == "fine-tune"
    training_phase = next_training_phase(state, config())
    assert [(plan.epoch, plan.data_epoch) for plan in training_phase.epochs] == [(3, 3), (3, 4)]
    assert [plan.learning_rate for plan in training_phase.epochs] == pytest.approx([0.1, 0.1])  # before the drop at 4
    state = advance(advance(advance(state, epoch("d"), config()), epoch("e"), config()), TRAINED, config())
    assert (state.phase, state.fine_tuned_at, state.epochs_trained) == ("prune", 0.0201, 5)


def test_fine_tunes_train_at_the_cosine_schedules_rate_of_the_prune_epoch():
    base = config(fine_tune_every=0.0, target=0.3)
    base = dataclasses.replace(base, train=dataclasses.replace(base.train, schedule="cosine"))
    events = [epoch("a"), epoch("b"), epoch("c"), TRAINED, iteration(0.3)]
    # Epoch 3 of 6 is the middle of the half cosine.
    fine_tune = next_training_phase(fold(events, base), base)
    assert [plan.learning_rate for plan in fine_tune.epochs] == pytest.approx([0.05, 0.05])
    final = next_training_phase(fold([*events, epoch("d"), epoch("e"), TRAINED], base), base)
    assert [plan.learning_rate for plan in final.epochs] == pytest.approx([0.05, 0.025, 0.05 * (1 - math.sqrt(0.75))])


def test_fine_tune_every_zero_means_after_every_prune():
    state = advance(initial_state(config(prune_epoch=0)), iteration(0.001), config(fine_tune_every=0.0))
    assert state.phase == "fine-tune"


def test_without_fine_tune_epochs_pruning_goes_on():
    state = advance(initial_state(config(prune_epoch=0)), iteration(0.3), config(fine_tune_epochs=0))
    assert state.phase == "prune"


def test_the_target_leads_to_the_final_training_and_that_to_the_end():
    once = config(target=0.3, fine_tune_every=0.5)
    state = fold([epoch("a"), epoch("b"), epoch("c"), TRAINED, iteration(0.3)], once)
    assert state.phase == "final"
    training_phase = next_training_phase(state, once)
    assert [(plan.epoch, plan.learning_rate) for plan in training_phase.epochs] == [
        (3, pytest.approx(0.1)),
        (4, pytest.approx(0.02)),
        (5, pytest.approx(0.02)),
    ]
    assert advance(state, TRAINED, once).phase == "done"


def test_the_iterations_end_pruning_short_of_the_target():
    base = config(prune_epoch=0, fine_tune_every=0.0)
    bounded = dataclasses.replace(base, prune=dataclasses.replace(base.prune, iterations=2))
    state = advance(initial_state(bounded), iteration(0.01), bounded)
    state = advance(state, TRAINED, bounded)
    assert (state.phase, state.iteration) == ("prune", 1)
    state = advance(state, iteration(0.02, (0,)), bounded)
    assert state.phase == "fine-tune"
    assert advance(state, TRAINED, bounded).phase == "final"
    at_once = dataclasses.replace(bounded, prune=dataclasses.replace(bounded.prune, fine_tune_epochs=0))
    assert fold([iteration(0.01), iteration(0.02, (0,))], at_once).phase == "final"


def test_prunes_since_the_checkpoint_are_kept_to_be_replayed_and_plans_compose():
    state = fold(
        [epoch("a"), epoch("b"), epoch("c"), TRAINED, iteration(0.005, (0, 2, 3)), iteration(0.01, (0, 2))], config()
    )
    assert (state.checkpoint, state.checkpoint_plan, len(state.steps)) == ("c", None, 2)
    assert Plan.from_json(state.plan).layers == {"conv": (0, 3)}  # the third of (0, 2, 3) is original filter 3
    state = advance(state, epoch("d"), config())
    assert (state.steps, state.checkpoint_plan) == ((), state.plan)


def test_an_unreadable_image_is_noted_once():
    state = fold([ImageExcluded(image="x.jpg", reason="broken")] * 2, config())
    assert state.excluded == ("x.jpg",)


def test_events_without_consequence_change_nothing():
    state = initial_state(config())
    assert advance(state, CalibrationDrawn(images=4, digest="0"), config()) == state


def with_targets(**shares):
    base = config(prune_epoch=0, fine_tune_every=0.5)
    return dataclasses.replace(base, prune=dataclasses.replace(base.prune, **shares))


def reached(reduction, kept=(0, 1), **others):
    return iteration(reduction, kept, reached=others)


def test_pruning_ends_when_every_target_is_reached():
    three = with_targets(flops_reduction=0.3, parameters_reduction=0.2, latency_reduction=0.1)
    state = initial_state(three)
    for shares, phase in (
        ((0.30, {"parameters": 0.19, "latency": 0.15}), "prune"),
        ((0.31, {"parameters": 0.20, "latency": 0.09}), "prune"),  # a clock goes back, too
        ((0.32, {"parameters": 0.21, "latency": 0.10}), "final"),
    ):
        state = advance(state, reached(shares[0], tuple(range(5 - state.iteration)), **shares[1]), three)
        assert state.phase == phase
        assert state.reached == {"FLOPs": shares[0], **shares[1]}


@pytest.mark.parametrize(("of", "key"), [("parameters", "parameters_reduction"), ("latency", "latency_reduction")])
def test_a_target_may_stand_without_one_for_flops(of, key):
    alone = with_targets(flops_reduction=0.0, **{key: 0.2})
    assert advance(initial_state(alone), reached(0.4, **{of: 0.19}), alone).phase == "prune"
    assert advance(initial_state(alone), reached(0.1, **{of: 0.2}), alone).phase == "final"


def test_fine_tune_goes_by_flops_whatever_the_targets_are():
    alone = with_targets(flops_reduction=0.0, parameters_reduction=0.2, fine_tune_every=0.1)
    assert advance(initial_state(alone), reached(0.09, parameters=0.15), alone).phase == "prune"
    state = advance(initial_state(alone), reached(0.1, parameters=0.05), alone)
    assert state.phase == "fine-tune"
    assert advance(state, TRAINED, alone).phase == "prune"


def test_when_no_filter_is_left_the_final_training_follows():
    alone = with_targets(flops_reduction=0.0, latency_reduction=0.2)
    state = fold([reached(0.1, latency=0.05), Exhausted(reason="no layer has a filter left")], alone)
    assert (state.phase, state.iteration, state.reached["latency"]) == ("final", 1, 0.05)
