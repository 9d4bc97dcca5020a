"""The section `prune`: what is removed, and when pruning ends."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from laasp_ray.config.fields import Doc, check
from laasp_ray.config.names import is_import_path

StepRule = Literal["flops_share", "layer_share"]
METHODS = ("laasp", "pls")
"""What `prune.method` may be, import paths aside."""
POOLING = re.compile(r"(max|avg)(?:([1-9]\d*)x([1-9]\d*))?")
"""What `prune.pooling` may be: all of a filter's output at once, or windows of height x width."""
DEFAULT_CRITERIA = ("l1", "l2", "euclidean", "cosine")
TARGETS = {"FLOPs": "flops_reduction", "parameters": "parameters_reduction", "latency": "latency_reduction"}
"""What a target may be of -> its key of `prune`."""


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What is removed, and when pruning ends.

    Pruning ends when all targets that are given are reached, after `iterations`, or when no filter is left to give. A
    run with `sparsity` removes no filters and has no targets. Latency is measured after every prune beside the unpruned
    network's: it is a clock's, so such a run is not repeatable, and one lucky measurement ends pruning.

    Of `prunes_per_iteration` the best candidate is carried out, and the next best whose prune changes nothing that
    another's does. Those that a race dropped do not count, and it drops most: `search.racing` off lets them all. A
    race's bound (`search.racing_error`) holds for the best one only.

    `step`, `max_pruned` and `criteria` are not method pls's. It and the criterion pls fit `components` to the filters'
    pooled outputs.
    """

    flops_reduction: Annotated[float, Doc("target share of multiply-accumulates to remove, 0 to 1; 0: no such target")]
    method: Annotated[
        str,
        Doc(
            "laasp: the cheapest prune of one layer; pls: the filters that tell least of the classes; or your own, "
            "package.module:Class"
        ),
    ] = "laasp"
    iterations: Annotated[int, Doc("iterations after which pruning ends even short of the target; 0: no bound")] = 0
    step: Annotated[float, Doc("laasp: what one prune is worth, 0 to 1, a share of what step_rule says")] = 0.01
    step_rule: Annotated[
        StepRule, Doc("flops_share: step is of the unpruned network's FLOPs; layer_share: of a layer's current filters")
    ] = "flops_share"
    max_pruned: Annotated[float, Doc("laasp: largest share of a layer's original filters that may go, 0 to 1")] = 0.75
    ignored: Annotated[
        tuple[str, ...], Doc("modules that are left alone: names, or prefixes of names ending in a dot")
    ] = ()
    extra_layers: Annotated[tuple[str, ...], Doc("linear layers that are candidates too, by name")] = ()
    criteria: Annotated[tuple[str, ...], Doc("pool of criteria, each once: names or package.module:function")] = (
        DEFAULT_CRITERIA
    )
    fine_tune_every: Annotated[
        float, Doc("share of FLOPs removed between two fine-tunes, 0 to 1; 0: after every prune")
    ] = 0.02
    fine_tune_epochs: Annotated[
        int, Doc("epochs of a fine-tune; with sparsity.stages, after each stage but the last")
    ] = 1
    percent: Annotated[
        float, Doc("pls: the percentage of the filters still prunable that an iteration removes, 0 to 100")
    ] = 10.0
    components: Annotated[int, Doc("pls: components of the partial least squares, at least 1")] = 2
    pooling: Annotated[str, Doc("pls: max or avg of a filter's whole output, or of windows, such as max2x2")] = "max"
    round_to: Annotated[int, Doc("a prune leaves a layer with a multiple of so many filters; 1: any number")] = 1
    prunes_per_iteration: Annotated[
        int, Doc("laasp: most candidates of an iteration that are carried out together, at least 1")
    ] = 1
    parameters_reduction: Annotated[float, Doc("target share of parameters to remove, 0 to 1; 0: no such target")] = 0.0
    latency_reduction: Annotated[
        float, Doc("target share by which the measured median latency is to fall, 0 to 1; 0: no such target")
    ] = 0.0
    latency_batch: Annotated[int, Doc("images a batch when latency is measured, at least 1")] = 1

    def __post_init__(self) -> None:
        for key in TARGETS.values():
            check(0 <= getattr(self, key) < 1, f"prune.{key}", getattr(self, key), "a share between 0 and 1")
        check(0 < self.step < 1, "prune.step", self.step, "a share between 0 and 1")
        check(0 < self.max_pruned < 1, "prune.max_pruned", self.max_pruned, "a share between 0 and 1")
        check(len(self.criteria) > 0, "prune.criteria", self.criteria, "at least one criterion")
        check(len(set(self.criteria)) == len(self.criteria), "prune.criteria", self.criteria, "each criterion once")
        check(0 <= self.fine_tune_every < 1, "prune.fine_tune_every", self.fine_tune_every, "a share from 0 to below 1")
        check(self.fine_tune_epochs >= 0, "prune.fine_tune_epochs", self.fine_tune_epochs, "at least 0")
        named = self.method in METHODS or is_import_path(self.method)
        check(named, "prune.method", self.method, "'laasp', 'pls' or an import path, package.module:Class")
        check(self.iterations >= 0, "prune.iterations", self.iterations, "at least 0 (0: no bound)")
        check(0 < self.percent < 100, "prune.percent", self.percent, "a percentage between 0 and 100, such as 10")
        check(self.components >= 1, "prune.components", self.components, "at least 1")
        whole = POOLING.fullmatch(self.pooling) is not None
        check(whole, "prune.pooling", self.pooling, "'max' or 'avg', with windows 'max2x2' or 'avg4x4'")
        check(self.round_to >= 1, "prune.round_to", self.round_to, "at least 1 (1: any number of filters)")
        check(self.prunes_per_iteration >= 1, "prune.prunes_per_iteration", self.prunes_per_iteration, "at least 1")
        one = self.prunes_per_iteration == 1 or self.method != "pls"
        check(
            one,
            "prune.prunes_per_iteration",
            self.prunes_per_iteration,
            "1 with method pls, which prunes many layers at once",
        )
        check(self.latency_batch >= 1, "prune.latency_batch", self.latency_batch, "at least 1")

    @property
    def targets(self) -> dict[str, float]:
        """The targets that are given: what of (a key of TARGETS) -> the share of the unpruned network's to be gone."""
        return {of: getattr(self, key) for of, key in TARGETS.items() if getattr(self, key) > 0}
