"""The section `prune` of method group_sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from laasp_ray.config.fields import Doc, check
from laasp_ray.config.prune import PruneConfig, check_left

if TYPE_CHECKING:
    from laasp_ray.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class GroupSparsityConfig(PruneConfig):
    """Group sparsity: `pruned_per_group` weights are zero in every group of `group` consecutive inputs of a
    convolution.

    Each stage but the last is followed by `fine_tune_epochs` of training. The last stage is followed by the rest of the
    schedule. The number for linear layers rises in the same proportion, rounded down. No filters are removed, and no
    losses are measured.
    """

    method: Annotated[str, Doc("group_sparsity, or your own that takes these keys, package.module:Class")] = (
        "group_sparsity"
    )
    group: Annotated[int, Doc("consecutive inputs of a layer that make a group, at least 2")] = 8
    pruned_per_group: Annotated[
        int, Doc("weights of each group that are pruned from convolutions, 1 to below group")
    ] = 6
    fc_pruned_per_group: Annotated[
        tuple[int, ...],
        Doc("the same for linear layers, one number for all or one for each in network order; none: they stay dense"),
    ] = ()
    stages: Annotated[
        tuple[int, ...], Doc("numbers pruned, rising to pruned_per_group, trained in between; none: one stage")
    ] = ()
    fine_tune_epochs: Annotated[int, Doc("epochs of training after each stage but the last")] = 1
    from_run: Annotated[str | None, Doc("the folder of a finished run whose pruned network is begun with")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.group >= 2, "prune.group", self.group, "at least 2")
        inside = f"from 1 to below prune.group ({self.group})"
        check(0 < self.pruned_per_group < self.group, "prune.pruned_per_group", self.pruned_per_group, inside)
        linear = self.fc_pruned_per_group
        check(all(0 < pruned < self.group for pruned in linear), "prune.fc_pruned_per_group", linear, inside)
        rising = all(a < b for a, b in zip((0, *self.stages), self.stages, strict=False))
        check(
            rising and self.stages[-1:] in ((), (self.pruned_per_group,)),
            "prune.stages",
            self.stages,
            f"rising from at least 1 to prune.pruned_per_group ({self.pruned_per_group})",
        )
        check(
            len(self.all_stages) == 1 or self.fine_tune_epochs > 0,
            "prune.fine_tune_epochs",
            self.fine_tune_epochs,
            "at least 1 with several prune.stages: they are trained in between",
        )

    @property
    def all_stages(self) -> tuple[int, ...]:
        return self.stages or (self.pruned_per_group,)

    @property
    def begins_with(self) -> str | None:
        return self.from_run

    def check_beside(self, run: RunConfig) -> None:
        check_left(run.search, "search.reestimate_batchnorm", "with method group_sparsity, which measures no losses")
        check(
            self.from_run is None or run.train.pretrained is None,
            "train.pretrained",
            run.train.pretrained,
            "left out with prune.from_run, which brings its weights",
        )
