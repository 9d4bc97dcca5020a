"""The settings of the examples: a short schedule, and few calibration images."""

from __future__ import annotations

from typing import Any

from laasp_ray.config import DataConfig, LaaspConfig, ModelConfig, RunConfig, SearchConfig, TrainConfig


def settings(name: str, builder: str, shape: tuple[int, int, int], **train: Any) -> RunConfig:
    """A run that trains for some epochs, removes 20% of the FLOPs and trains on. `train` replaces its settings."""
    schedule: dict[str, Any] = {
        "epochs": 12,
        "prune_epoch": 8,
        "batch_size": 32,
        "learning_rate": 0.05,
        "schedule": "cosine",
    }
    return RunConfig(
        name=name,
        model=ModelConfig(builder=builder, input_shape=shape),
        data=DataConfig(factory="given"),  # prune(data=...) gives it
        prune=LaaspConfig(flops_reduction=0.2, step=0.05, criteria=("l1", "cosine"), fine_tune_every=0.1),
        search=SearchConfig(images=64, batch_size=32),
        train=TrainConfig(**{**schedule, **train}),
    )
