"""Events of a run for tests, with simple default values. A test passes the values that matter to it."""

from __future__ import annotations

from typing import Any

from laasp_ray.records import Decision, Metrics
from laasp_ray.run.events import EpochDone, IterationDone, RunFinished, RunStarted, TrainingPhaseDone


def metrics(top1: float = 0.5, loss: float = 0.5, images: int = 360) -> Metrics:
    return Metrics(loss=loss, top1=top1, top5=1.0, images=images)


def run_started(**changes: Any) -> RunStarted:
    values = {
        "config": {},
        "checkpoint": "initial",
        "macs": 1000,
        "macs_convention": "by hand",
        "parameters": 10,
        "filters": {},
        "step_sizes": {},
        "layers": 0,
        "skipped_layers": {},
        "train_images": 4,
        "test_images": 4,
    }
    return RunStarted(**(values | changes))


def epoch_done(**changes: Any) -> EpochDone:
    values = {
        "phase": "train",
        "training_phase": 0,
        "epoch": 0,
        "position": 1,
        "epochs": 1,
        "epochs_trained": 1,
        "learning_rate": 0.1,
        "loss": 1.0,
        "top1": 0.5,
        "images": 4,
        "seconds": 1.0,
        "test_seconds": 0.0,
        "checkpoint": "000000",
    }
    return EpochDone(**(values | changes))


def phase_done(phase: str = "train", **changes: Any) -> TrainingPhaseDone:
    values = {
        "phase": phase,
        "training_phase": 0,
        "metrics": metrics(),
        "loader": "torchvision",
        "seconds": 1.0,
        "evaluation_seconds": 0.5,
    }
    return TrainingPhaseDone(**(values | changes))


def decision(**changes: Any) -> Decision:
    values = {
        "iteration": 1,
        "layer": "conv",
        "criterion": "l1",
        "filters": (2,),
        "loss": 1.0,
        "loss_before": 1.0,
        "flops_reduction": 0.1,
    }
    return Decision(**(values | changes))


def iteration_done(chosen: Decision | None = None, **changes: Any) -> IterationDone:
    chosen = chosen or decision()
    values = {"iteration": chosen.iteration, "decision": chosen, "seconds": {"total": 1.0}}
    return IterationDone(**(values | changes))


def run_finished(**changes: Any) -> RunFinished:
    values = {
        "macs": 900,
        "macs_unpruned": 1000,
        "macs_convention": "by hand",
        "flops_reduction": 0.1,
        "parameters": 9,
        "parameters_unpruned": 10,
        "metrics": metrics(),
        "seconds": 10.0,
    }
    return RunFinished(**(values | changes))
