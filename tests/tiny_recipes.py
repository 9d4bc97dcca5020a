"""Recipes reduced to a few images and one epoch per training phase, to be run whole in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fakes import Silent
from whole_runs import events_of

from laasp_ray import prune
from laasp_ray.api import PruneResult
from laasp_ray.config import ExportConfig, FilterPruneConfig, GroupSparsityConfig, PruneConfig, RunConfig
from laasp_ray.store.journal import Event


def tiny(config: RunConfig, pictures: Path, storage: Path, *, side: int = 32) -> RunConfig:
    """A recipe with 3 classes of a few images, of at most `side` x `side` pixels, and one epoch per training phase.

    The settings of pruning stay the same, except that group sparsity has two stages, so that there is training in
    between.
    """
    side = min(side, config.data.image_size)
    prune: PruneConfig
    if isinstance(config.prune, GroupSparsityConfig):
        last = config.prune.pruned_per_group
        prune = dataclasses.replace(config.prune, stages=(last // 2, last), fine_tune_epochs=1)
    else:
        assert isinstance(config.prune, FilterPruneConfig)
        prune = dataclasses.replace(config.prune, flops_reduction=0.001, fine_tune_every=0.0, fine_tune_epochs=1)
    return dataclasses.replace(
        config,
        storage=str(storage),
        model=dataclasses.replace(
            config.model, arguments={**config.model.arguments, "num_classes": 3}, input_shape=(3, side, side)
        ),
        data=dataclasses.replace(
            config.data, path=str(pictures), format="folder", image_size=side, eval_resize=side, threads=1
        ),
        prune=prune,
        search=dataclasses.replace(config.search, images=6, batch_size=6),
        export=ExportConfig(format="none", latency=()),
        train=dataclasses.replace(
            config.train, epochs=2, prune_epoch=1, drop_epochs=(), batch_size=6, learning_rate=0.001
        ),
    )


def run_here(config: RunConfig) -> tuple[PruneResult, list[Event]]:
    """Carries out the whole run in this process. Returns its result and its journal's events."""
    result = prune(config, distributed=False, progress=Silent())
    return result, events_of(config)
