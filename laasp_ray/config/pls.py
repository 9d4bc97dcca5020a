"""The section `prune` of method pls, and the keys that the criterion pls needs in any pool."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from laasp_ray.config.fields import Doc, check
from laasp_ray.config.prune import FilterPruneConfig, PruneConfig

POOLING = re.compile(r"(max|avg)(?:([1-9]\d*)x([1-9]\d*))?")
"""The form of `prune.pooling`: a filter's whole output, or windows of height x width."""


@dataclass(frozen=True, kw_only=True)
class FitConfig(PruneConfig):
    """Settings of the partial least squares fit to the filters' pooled outputs."""

    components: Annotated[int, Doc("components of the partial least squares, at least 1")] = 2
    pooling: Annotated[str, Doc("max or avg of a filter's whole output, or of windows, such as max2x2")] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.components >= 1, "prune.components", self.components, "at least 1")
        whole = POOLING.fullmatch(self.pooling) is not None
        check(whole, "prune.pooling", self.pooling, "'max' or 'avg', with windows 'max2x2' or 'avg4x4'")


@dataclass(frozen=True, kw_only=True)
class PlsConfig(FitConfig, FilterPruneConfig):
    """PLS: each iteration removes the filters that are least informative about the classes, over all layers."""

    method: Annotated[str, Doc("pls, or your own that takes these keys, package.module:Class")] = "pls"
    percent: Annotated[float, Doc("percentage of the filters still prunable that an iteration removes, 0 to 100")] = (
        10.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.percent < 100, "prune.percent", self.percent, "a percentage between 0 and 100, such as 10")
