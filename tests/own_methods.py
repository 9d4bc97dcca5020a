"""A user's methods, named by import path in tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from laasp_ray.config import FilterPruneConfig
from laasp_ray.config.fields import Doc, check
from laasp_ray.criteria import lowest, scores
from laasp_ray.errors import ConfigError
from laasp_ray.methods import IterationContext, IterationResult, PruningMethod
from laasp_ray.methods.estimate import Estimate
from laasp_ray.methods.preparation import Preparation, UnprunedNetwork


@dataclass(frozen=True, kw_only=True)
class FirstConfig(FilterPruneConfig):
    """The keys of `First`."""

    filters: Annotated[int, Doc("filters that an iteration takes, at least 1")] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.filters >= 1, "prune.filters", self.filters, "at least 1")


class First(PruningMethod[FirstConfig]):
    """Prunes the filters with the lowest l1 norms of the first layer."""

    config_class = FirstConfig

    def prepare(self, network: UnprunedNetwork) -> Preparation:
        prepared = super().prepare(network)
        if "0" not in prepared.baseline.filters:
            raise ConfigError("First prunes layer 0, and there is none")
        return prepared

    def iterate(self, context: IterationContext[FirstConfig]) -> IterationResult:
        norms = scores("l1", context.model.get_submodule("0"))
        return context.prune({"0": lowest(norms, context.config.filters)}, "l1")

    def estimate(self, network: UnprunedNetwork, prepared: Preparation, calibration_images: int) -> Estimate:
        return Estimate(iterations=3, fine_tunes=1, passes=2.0, rows=(("layer", "0, three times"),))


class NoMethod:
    """Has no section."""
