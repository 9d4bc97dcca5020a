"""The state of a run as a fold of its journal: pure functions, used alike while a run lives and when it is resumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from laasp_ray.config import RunConfig, TrainConfig
from laasp_ray.pruning.plan import Plan
from laasp_ray.records import Phase, Place, RunState, decision_from_json
from laasp_ray.train.loop import EpochPlan, TrainingPhase


def initial_state(config: RunConfig) -> RunState:
    """A run that is given weights at the prune epoch, or prunes at epoch 0, begins with pruning.

    One that prunes nothing has its final training only.
    """
    if not config.prunes:
        return RunState(phase="final")
    given = config.train.pretrained is not None or (
        config.sparsity is not None and config.sparsity.from_run is not None
    )
    trained_already = given or config.train.prune_epoch == 0
    return RunState(phase="prune" if trained_already else "train")


def advance(state: RunState, name: str, data: Mapping[str, Any], config: RunConfig) -> RunState:
    """The state after an event of the journal. Events that change nothing here are passed over."""
    if name == "start":
        begun_with = data.get("plan")  # of the run whose pruned network this one goes on with
        return replace(state, checkpoint=data["checkpoint"], plan=begun_with, checkpoint_plan=begun_with)
    if name == "epoch":
        return replace(
            state,
            checkpoint=data["checkpoint"],
            checkpoint_plan=state.plan,
            steps=(),
            phase_epochs_done=state.phase_epochs_done + 1,
            epochs_trained=state.epochs_trained + 1,
        )
    if name == "training_phase":
        following: Phase = "done" if state.phase == "final" else _after_training(state, config)
        return replace(
            state,
            phase=following,
            phases_done=state.phases_done + 1,
            phase_epochs_done=0,
            fine_tuned_at=state.flops_reduction,
        )
    if name == "iteration":
        return _after_iteration(state, data, config)
    if name == "exhausted":  # no filter is left to give, and latency is still not what it should be
        return replace(state, phase="final")
    if name == "stage":
        return _after_stage(state, config)
    if name == "excluded" and data["image"] not in state.excluded:
        places = state.places
        if "index" in data:
            where = {key: data[key] for key in ("split", "index", "label")}
            places = (*places, Place(name=data["image"], **where))
        return replace(state, excluded=(*state.excluded, data["image"]), places=places)
    return state


def fold(events: Iterable[tuple[str, Mapping[str, Any]]], config: RunConfig) -> RunState:
    state = initial_state(config)
    for name, data in events:
        state = advance(state, name, data, config)
    return state


def _after_training(state: RunState, config: RunConfig) -> Phase:
    if config.sparsity is not None:
        return "prune"
    met = all(state.reached[of] >= share for of, share in config.prune.targets.items())
    return "final" if met or 0 < config.prune.iterations <= state.iteration else "prune"


def _after_iteration(state: RunState, data: Mapping[str, Any], config: RunConfig) -> RunState:
    step = Plan.from_json(data["step"])
    before = Plan.empty() if state.plan is None else Plan.from_json(state.plan)
    reduction = decision_from_json(data["decision"]).flops_reduction
    reached = data.get("reached", {})  # of targets besides FLOPs
    state = replace(
        state,
        iteration=state.iteration + 1,
        flops_reduction=reduction,
        parameters_reduction=reached.get("parameters", 0.0),
        latency_reduction=reached.get("latency", 0.0),
        plan=before.then(step).to_json(),
        steps=(*state.steps, data["step"]),
    )
    due = reduction - state.fine_tuned_at >= config.prune.fine_tune_every
    if config.prune.fine_tune_epochs > 0 and due:
        return replace(state, phase="fine-tune")
    return replace(state, phase=_after_training(state, config))


def _after_stage(state: RunState, config: RunConfig) -> RunState:
    """The last stage is trained for the rest of the schedule, those before for as long as a fine-tuning."""
    assert config.sparsity is not None
    last = state.iteration + 1 == len(config.sparsity.all_stages)
    return replace(state, iteration=state.iteration + 1, phase="final" if last else "fine-tune")


def next_training_phase(state: RunState, config: RunConfig) -> TrainingPhase:
    """The training phase that the state's phase (train, fine-tune or final) asks for, less what is done of it.

    Fine-tunings train at the learning rate of the prune epoch. Every epoch has a number of its own (`data_epoch`), so
    that no two epochs of a run see the same augmentation.
    """
    train = config.train
    whole = (
        not config.prunes and train.pretrained is None
    )  # in one training phase: a new one would begin without momentum
    epochs = {
        "train": range(train.prune_epoch),
        "fine-tune": [train.prune_epoch] * config.prune.fine_tune_epochs,
        "final": range(0 if whole else train.prune_epoch, train.epochs),
    }[state.phase]
    first = state.epochs_trained - state.phase_epochs_done
    plans = tuple(
        EpochPlan(epoch=epoch, data_epoch=first + position, learning_rate=_learning_rate(train, epoch))
        for position, epoch in enumerate(epochs)
    )
    return TrainingPhase(
        number=state.phases_done,
        phase=state.phase,
        epochs=plans,
        done=state.phase_epochs_done,
        excluded=state.excluded,
        places=state.places,
    )


def _learning_rate(train: TrainConfig, epoch: int) -> float:
    # t_p may be the schedule's end, when nothing is left to train after pruning; fine-tunings then use its last rate.
    return train.learning_rate_at(min(epoch, train.epochs - 1))
