"""A run's settings, as frozen dataclasses: one file a section. Whoever uses them imports them from here."""

from __future__ import annotations

from laasp_ray.config.cluster import ClusterConfig
from laasp_ray.config.data import DATA_FORMATS, DataConfig, LoaderName
from laasp_ray.config.model import ModelConfig
from laasp_ray.config.prune import DEFAULT_CRITERIA, METHODS, POOLING, TARGETS, PruneConfig, StepRule
from laasp_ray.config.run import RunConfig
from laasp_ray.config.search import SearchConfig
from laasp_ray.config.sparsity import SparsityConfig
from laasp_ray.config.train import TrainConfig

__all__ = [
    "DATA_FORMATS",
    "ClusterConfig",
    "DEFAULT_CRITERIA",
    "DataConfig",
    "LoaderName",
    "METHODS",
    "ModelConfig",
    "POOLING",
    "PruneConfig",
    "RunConfig",
    "SearchConfig",
    "SparsityConfig",
    "StepRule",
    "TARGETS",
    "TrainConfig",
]
