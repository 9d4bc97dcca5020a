"""LAASP as in the paper, and LAASP with compensation (methods.md), of any recipe that chooses filters by loss."""

from __future__ import annotations

from dataclasses import replace

from laasp_ray.config import COMPENSATED_CRITERIA, DEFAULT_CRITERIA, LaaspConfig, RunConfig

PAPER, COMPENSATED = "paper", "compensated"


def compensated(prune: LaaspConfig) -> LaaspConfig:
    """`prune` with compensation: obs in the pool, every candidate and every prune made up for, BatchNorm anew."""
    return replace(prune, criteria=COMPENSATED_CRITERIA, compensate="full", reestimate_batchnorm=True)


def as_published(prune: LaaspConfig) -> LaaspConfig:
    """`prune` as the paper has it: its four criteria, and what removed filters gave is lost."""
    return replace(prune, criteria=DEFAULT_CRITERIA, compensate="off", reestimate_batchnorm=False)


OF_LAASP = {PAPER: as_published, COMPENSATED: compensated}
"""Variants that every recipe of method laasp has, by name. A run gets its variant's name at the end of its own."""


def with_laasp(config: RunConfig, prune: LaaspConfig, variant: str) -> RunConfig:
    """The variant of `config`, whose section `prune` is given."""
    return replace(config, name=f"{config.name}-{variant}", prune=OF_LAASP[variant](prune))
