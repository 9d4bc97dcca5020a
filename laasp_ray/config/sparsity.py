"""The section `sparsity`: weights that are zero in groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from laasp_ray.config.fields import Doc, check


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Group sparsity: of every `group` consecutive inputs, `prune` weights of a convolution are zero.

    After each stage but the last `prune.fine_tune_epochs` of training follow, after the last the rest of the schedule.
    Linear layers rise in proportion, rounded down.
    """

    group: Annotated[int, Doc("consecutive inputs of a layer that make a group, at least 2")] = 8
    prune: Annotated[int, Doc("weights of each group that are pruned from convolutions, 1 to below group")] = 6
    fc_prune: Annotated[
        tuple[int, ...],
        Doc("the same for linear layers, one number for all or one for each in network order; none: they stay dense"),
    ] = ()
    stages: Annotated[tuple[int, ...], Doc("numbers pruned, rising to prune, trained in between; none: one stage")] = ()
    from_run: Annotated[str | None, Doc("the folder of a finished run whose pruned network is begun with")] = None

    def __post_init__(self) -> None:
        check(self.group >= 2, "sparsity.group", self.group, "at least 2")
        inside = f"from 1 to below sparsity.group ({self.group})"
        check(0 < self.prune < self.group, "sparsity.prune", self.prune, inside)
        check(all(0 < p < self.group for p in self.fc_prune), "sparsity.fc_prune", self.fc_prune, inside)
        rising = all(a < b for a, b in zip((0, *self.stages), self.stages, strict=False))
        check(
            rising and self.stages[-1:] in ((), (self.prune,)),
            "sparsity.stages",
            self.stages,
            f"rising from at least 1 to sparsity.prune ({self.prune})",
        )

    @property
    def all_stages(self) -> tuple[int, ...]:
        return self.stages or (self.prune,)
