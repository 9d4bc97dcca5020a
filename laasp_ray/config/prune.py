"""The section `prune`: the keys of every method, and the keys of methods that remove filters.

A run has the section of its method. The classes are in laasp.py, pls.py and group_sparsity.py; methods.py has them by
name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from laasp_ray.config.fields import Doc, check, check_types
from laasp_ray.config.names import is_import_path

if TYPE_CHECKING:
    from laasp_ray.config.run import RunConfig

Compensate = Literal["off", "channels", "full"]
TARGETS = {"FLOPs": "flops_reduction", "parameters": "parameters_reduction", "latency": "latency_reduction"}
"""Quantity that a target can have -> its key in `prune`."""
TARGET_ROUNDING = 1e-9
"""A reduction that is short of its target by so little has reached it: far less than a filter, more than rounding."""


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The keys of every method. A user's own method may use a subclass with more keys as its section."""

    method: Annotated[str, Doc("laasp, pls, group_sparsity, or your own, package.module:Class")]
    ignored: Annotated[
        tuple[str, ...], Doc("modules that are left alone: names, or prefixes of names ending in a dot")
    ] = ()
    fine_tune_epochs: Annotated[int, Doc("epochs of a fine-tune, at least 0")] = 1

    def __post_init__(self) -> None:
        check_types(self, "prune.")
        # A dataclass keeps plain defaults as class attributes, so this is the name of the built-in method of this
        # section, if there is one.
        own = getattr(type(self), "method", None)
        known = [repr(own)] if isinstance(own, str) else []
        fits = self.method == own or is_import_path(self.method)
        wanted = " or ".join([*known, "an import path, package.module:Class"])
        check(fits, "prune.method", self.method, f"{wanted}, in a {type(self).__name__}")
        check(self.fine_tune_epochs >= 0, "prune.fine_tune_epochs", self.fine_tune_epochs, "at least 0")

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned, filters or weights."""
        return True

    @property
    def targets(self) -> dict[str, float]:
        """The given targets: quantity (a key of TARGETS) -> share of the unpruned network's value to remove."""
        return {}

    @property
    def begins_with(self) -> str | None:
        """The folder of the finished run whose pruned network this run begins with, or None."""
        return None

    def is_reached(self, gone: Mapping[str, float], iterations: int) -> bool:
        """Whether pruning ends after `iterations`, with these reductions by quantity (a key of TARGETS).

        False here: only the method itself ends pruning.
        """
        return False

    def fine_tunes_after(self, gone: float) -> bool:
        """Whether a fine-tune follows when this share of FLOPs was removed since the last one."""
        return False

    def check_beside(self, run: RunConfig) -> None:
        """Raises ConfigError if another section of the run contradicts this one."""


@dataclass(frozen=True, kw_only=True)
class FilterPruneConfig(PruneConfig):
    """The keys of methods that remove filters.

    Pruning ends when all given targets are reached, after `iterations`, or when no layer has a filter left to prune.
    Nothing is pruned without a target. Latency is measured after every prune, together with the unpruned network's. A
    measured latency varies, so such a run is not repeatable, and one low measurement ends pruning.
    """

    flops_reduction: Annotated[float, Doc("target share of multiply-accumulates to remove, 0 to 1; 0: no such target")]
    parameters_reduction: Annotated[float, Doc("target share of parameters to remove, 0 to 1; 0: no such target")] = 0.0
    latency_reduction: Annotated[
        float, Doc("target share by which the measured median latency is to fall, 0 to 1; 0: no such target")
    ] = 0.0
    latency_batch: Annotated[int, Doc("images a batch when latency is measured, at least 1")] = 1
    iterations: Annotated[int, Doc("iterations after which pruning ends even short of the target; 0: no bound")] = 0
    extra_layers: Annotated[
        tuple[str, ...], Doc("linear layers that are candidates too, by name; a star stands for any part of a name")
    ] = ()
    compensate: Annotated[
        Compensate,
        Doc(
            "how layers make up for the channels that they lose: full, by least squares over kernels' taps; channels, "
            "one mix for all taps; off"
        ),
    ] = "off"
    reestimate_batchnorm: Annotated[
        bool, Doc("after a prune, BatchNorms behind it get their statistics from the calibration images")
    ] = False
    exact_target: Annotated[
        bool, Doc("laasp, pls: the last prune takes no more filters than the target needs, though its step is larger")
    ] = True
    round_to: Annotated[int, Doc("a prune leaves a layer with a multiple of so many filters; 1: any number")] = 1
    fine_tune_every: Annotated[
        float, Doc("share of FLOPs removed between two fine-tunes, 0 to 1; 0: after every prune")
    ] = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in TARGETS.values():
            check(0 <= getattr(self, key) < 1, f"prune.{key}", getattr(self, key), "a share between 0 and 1")
        check(self.latency_batch >= 1, "prune.latency_batch", self.latency_batch, "at least 1")
        check(self.iterations >= 0, "prune.iterations", self.iterations, "at least 0 (0: no bound)")
        check(self.round_to >= 1, "prune.round_to", self.round_to, "at least 1 (1: any number of filters)")
        check(0 <= self.fine_tune_every < 1, "prune.fine_tune_every", self.fine_tune_every, "a share from 0 to below 1")

    @property
    def prunes(self) -> bool:
        return bool(self.targets)

    @property
    def targets(self) -> dict[str, float]:
        return {of: getattr(self, key) for of, key in TARGETS.items() if getattr(self, key) > 0}

    def is_reached(self, gone: Mapping[str, float], iterations: int) -> bool:
        return self.reaches_targets(gone) or 0 < self.iterations <= iterations

    def reaches_targets(self, gone: Mapping[str, float]) -> bool:
        """Whether these reductions by quantity reach all targets. A quantity that is not there has not reached its."""
        return all(of in gone and gone[of] >= share - TARGET_ROUNDING for of, share in self.targets.items())

    def fine_tunes_after(self, gone: float) -> bool:
        return self.fine_tune_epochs > 0 and gone >= self.fine_tune_every

    def check_beside(self, run: RunConfig) -> None:
        if not self.prunes:
            off = "without a target (prune.flops_reduction and others), when nothing is pruned"
            check_left(self, "prune.iterations", off)
            check_left(run.train, "train.distill", off)
        enough = run.search.images >= 2 or not self.reestimate_batchnorm
        check(enough, "search.images", run.search.images, "at least 2 with prune.reestimate_batchnorm")


def check_left(section: Any, key: str, why: str) -> None:
    """Raises ConfigError unless the dotted `key` of `section` has its default value. `why` ends the sentence."""
    name = key.rpartition(".")[2]
    default = next(field.default for field in dataclasses.fields(section) if field.name == name)
    value = getattr(section, name)
    check(value == default, key, value, f"left at {default!r} {why}")
