"""The state of a run as a fold of its journal. The same pure functions serve a live run and a resumed one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from laasp_ray.config import RunConfig, TrainConfig
from laasp_ray.pruning.plan import Plan
from laasp_ray.records import Phase, Place, RunState
from laasp_ray.run.events import (
    EpochDone,
    Exhausted,
    Happening,
    ImageExcluded,
    IterationDone,
    RunStarted,
    TrainingPhaseDone,
)
from laasp_ray.store.checkpoint import RACES, WEIGHTS, unpruned_file
from laasp_ray.train.loop import EpochPlan, TrainingPhase


def initial_state(config: RunConfig) -> RunState:
    """The state before the first event. A run with given weights, or with prune epoch 0, begins with pruning.

    A run that prunes nothing has only its final training.
    """
    if not config.prunes:
        return RunState(phase="final")
    given = config.train.pretrained is not None or config.prune.begins_with is not None
    trained_already = given or config.train.prune_epoch == 0
    return RunState(phase="prune" if trained_already else "train")


def advance(state: RunState, event: Happening, config: RunConfig) -> RunState:
    """The state after an event. An event that does not affect the state is ignored."""
    match event:
        case RunStarted():  # `plan` is that of the run whose pruned network this one goes on with
            state = replace(state, checkpoint=event.checkpoint, plan=event.plan, checkpoint_plan=event.plan)
            return replace(state, digests=event.digests, batch_parts=event.batch_parts or 1)
        case EpochDone():
            return replace(
                state,
                checkpoint=event.checkpoint,
                checkpoint_plan=state.plan,
                steps=(),
                weights=(),
                race="",
                phase_epochs_done=state.phase_epochs_done + 1,
                epochs_trained=state.epochs_trained + 1,
                digests=_replaced(_without_weights(state.digests), event.digests, "checkpoints/"),
            )
        case TrainingPhaseDone():
            following: Phase = "done" if state.phase == "final" else _after_training(state, config)
            return replace(
                state,
                phase=following,
                phases_done=state.phases_done + 1,
                phase_epochs_done=0,
                fine_tuned_at=state.flops_reduction,
            )
        case IterationDone():
            return _after_iteration(state, event, config)
        case Exhausted():
            return replace(state, phase="final")
        case ImageExcluded() if event.image not in state.excluded:
            return replace(state, excluded=(*state.excluded, event.image), places=(*state.places, *_place_of(event)))
    return state


def fold(events: Iterable[Happening], config: RunConfig) -> RunState:
    """The state after all events of a journal."""
    state = initial_state(config)
    for event in events:
        state = advance(state, event, config)
    return state


def _replaced(known: Mapping[str, str], new: Mapping[str, str], folder: str) -> dict[str, str]:
    """The digests after an event: those of `folder` are the event's, but for the unpruned network's, which stays."""
    stays = {file: digest for file, digest in known.items() if not file.startswith(folder) or file == unpruned_file()}
    return stays | {file: digest for file, digest in new.items() if not file.startswith("candidates/")}


def _without_weights(digests: Mapping[str, str]) -> dict[str, str]:
    return {file: digest for file, digest in digests.items() if not file.startswith((WEIGHTS, RACES))}


def _place_of(event: ImageExcluded) -> tuple[Place, ...]:
    if event.split is None or event.index is None or event.label is None:
        return ()
    return (Place(name=event.image, split=event.split, index=event.index, label=event.label),)


def _after_training(state: RunState, config: RunConfig) -> Phase:
    return "final" if config.prune.is_reached(state.reached, state.iteration) else "prune"


def _after_iteration(state: RunState, event: IterationDone, config: RunConfig) -> RunState:
    digests = {file: digest for file, digest in state.digests.items() if not file.startswith(RACES)}
    digests = _replaced(digests, event.digests, "masks/")
    race = next((file for file in event.digests if file.startswith(RACES)), "")
    state = replace(state, iteration=state.iteration + 1, digests=digests, race=race)
    if event.step is not None:
        before = Plan.empty() if state.plan is None else Plan.from_json(state.plan)
        plan = before.then(Plan.from_json(event.step))
        weights = next((file for file in event.digests if file.startswith(WEIGHTS)), "")
        steps, files = (*state.steps, event.step), (*state.weights, weights)
        state = replace(state, plan=plan.to_json(), steps=steps, weights=files)
    if event.decision is not None:
        state = replace(
            state,
            flops_reduction=event.decision.flops_reduction,
            parameters_reduction=event.reached.get("parameters", 0.0),
            latency_reduction=event.reached.get("latency", 0.0),
        )
    if event.ends_pruning is not None:  # the method decides: training follows each iteration but the last
        return replace(state, phase="final" if event.ends_pruning else "fine-tune")
    if config.prune.fine_tunes_after(state.flops_reduction - state.fine_tuned_at):
        return replace(state, phase="fine-tune")
    return replace(state, phase=_after_training(state, config))


def next_training_phase(state: RunState, config: RunConfig) -> TrainingPhase:
    """The training phase for the state's phase (train, fine-tune or final), with the number of its epochs that are
    done.

    A fine-tune uses the learning rate of the prune epoch. Every epoch has its own number (`data_epoch`), so that no two
    epochs of a run have the same augmentation.
    """
    train = config.train
    whole = not config.prunes and train.pretrained is None  # one phase, because a new phase begins without momentum
    epochs = {
        "train": range(train.prune_epoch),
        "fine-tune": [train.prune_epoch] * config.prune.fine_tune_epochs,
        "final": range(0 if whole else train.prune_epoch, train.epochs),
    }[state.phase]
    first = state.epochs_trained - state.phase_epochs_done
    plans = tuple(
        EpochPlan(
            epoch=epoch, data_epoch=first + position, learning_rate=_learning_rate(train, epoch, state.batch_parts)
        )
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


def _learning_rate(train: TrainConfig, epoch: int, parts: int) -> float:
    # If t_p is the schedule's end, nothing is trained after pruning, and a fine-tune uses the last learning rate.
    return train.learning_rate_at(min(epoch, train.epochs - 1), parts)
