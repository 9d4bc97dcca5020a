"""The settings of a run as frozen dataclasses, one file for each section. Other code imports them from here."""

from __future__ import annotations

from laasp_ray.config.cluster import ClusterConfig
from laasp_ray.config.data import DATA_FORMATS, DataConfig, LoaderName
from laasp_ray.config.export import ENGINES, Engine, ExportConfig, ExportFormat
from laasp_ray.config.group_sparsity import GroupSparsityConfig
from laasp_ray.config.laasp import COMPENSATED_CRITERIA, DEFAULT_CRITERIA, LaaspConfig, StepRule
from laasp_ray.config.methods import SECTIONS
from laasp_ray.config.model import ModelConfig
from laasp_ray.config.pls import POOLING, PlsConfig
from laasp_ray.config.prune import TARGET_ROUNDING, TARGETS, Compensate, FilterPruneConfig, PruneConfig
from laasp_ray.config.run import RunConfig
from laasp_ray.config.search import Precision, SearchConfig
from laasp_ray.config.train import TrainConfig

__all__ = [
    "DATA_FORMATS",
    "ClusterConfig",
    "Compensate",
    "COMPENSATED_CRITERIA",
    "DEFAULT_CRITERIA",
    "DataConfig",
    "ENGINES",
    "Engine",
    "ExportConfig",
    "ExportFormat",
    "FilterPruneConfig",
    "GroupSparsityConfig",
    "LaaspConfig",
    "LoaderName",
    "Precision",
    "ModelConfig",
    "POOLING",
    "PlsConfig",
    "PruneConfig",
    "RunConfig",
    "SECTIONS",
    "SearchConfig",
    "StepRule",
    "TARGETS",
    "TARGET_ROUNDING",
    "TrainConfig",
]
