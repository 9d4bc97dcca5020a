"""The section `prune` of method laasp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from laasp_ray.config.fields import Doc, check
from laasp_ray.config.pls import FitConfig
from laasp_ray.config.prune import FilterPruneConfig

StepRule = Literal["flops_share", "layer_share"]
DEFAULT_CRITERIA = ("l1", "l2", "euclidean", "cosine")
"""The paper's pool."""
COMPENSATED_CRITERIA = (*DEFAULT_CRITERIA, "obs")
"""The pool of runs with compensation."""


@dataclass(frozen=True, kw_only=True)
class LaaspConfig(FitConfig, FilterPruneConfig):
    """LAASP: each iteration carries out the cheapest prune of one layer.

    `prunes_per_iteration` candidates are carried out: the best one, and the next best whose prunes do not change what
    another one changes. Candidates that a race dropped are not taken, and a race drops most of them. `search.racing`
    off keeps them all. The error bound of a race (`search.racing_error`) holds for the best candidate only.

    `components` and `pooling` are settings of the criterion pls, if the pool has it.
    """

    method: Annotated[str, Doc("laasp, or your own that takes these keys, package.module:Class")] = "laasp"
    step: Annotated[float, Doc("what one prune is worth, 0 to 1, a share of what step_rule says")] = 0.01
    step_rule: Annotated[
        StepRule, Doc("flops_share: step is of the unpruned network's FLOPs; layer_share: of a layer's current filters")
    ] = "flops_share"
    max_pruned: Annotated[float, Doc("largest share of a layer's original filters that may go, 0 to 1")] = 0.75
    criteria: Annotated[tuple[str, ...], Doc("pool of criteria, each once: names or package.module:function")] = (
        DEFAULT_CRITERIA
    )
    prunes_per_iteration: Annotated[
        int, Doc("most candidates of an iteration that are carried out together, at least 1")
    ] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.step < 1, "prune.step", self.step, "a share between 0 and 1")
        check(0 < self.max_pruned < 1, "prune.max_pruned", self.max_pruned, "a share between 0 and 1")
        check(len(self.criteria) > 0, "prune.criteria", self.criteria, "at least one criterion")
        check(len(set(self.criteria)) == len(self.criteria), "prune.criteria", self.criteria, "each criterion once")
        check(self.prunes_per_iteration >= 1, "prune.prunes_per_iteration", self.prunes_per_iteration, "at least 1")
