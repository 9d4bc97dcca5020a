"""A run, as frozen dataclasses. Shapes and ranges are checked here; an unknown key is an error.

`RunConfig.to_dict` and `from_dict` are inverse to each other; the dictionary is what a run's `config.json` holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from laasp_ray.config.cluster import ClusterConfig
from laasp_ray.config.compat import with_current_names
from laasp_ray.config.data import DataConfig
from laasp_ray.config.fields import Doc, build, check, to_plain
from laasp_ray.config.model import ModelConfig
from laasp_ray.config.prune import TARGETS, PruneConfig
from laasp_ray.config.search import SearchConfig
from laasp_ray.config.sparsity import SparsityConfig
from laasp_ray.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run. When it is resumed some keys may differ (config/compat.py), nothing else may.

    With `sparsity` the run makes groups sparse instead of removing filters. Without it and without a target (see
    PruneConfig) it prunes nothing: it trains by the whole schedule, or given weights from the prune epoch on.
    """

    name: Annotated[str, Doc("the run's name; the same name goes on with the run")]
    model: ModelConfig
    data: DataConfig
    prune: PruneConfig
    train: TrainConfig
    search: SearchConfig = field(default_factory=SearchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    sparsity: SparsityConfig | None = None
    storage: Annotated[str, Doc("where runs are kept: a folder, or an s3:// or gs:// address")] = "runs"
    seed: Annotated[int, Doc("the one source of randomness")] = 0

    def __post_init__(self) -> None:
        plain = self.name.replace("-", "").replace("_", "").replace(".", "")
        check(plain.isalnum() and self.name[0].isalnum(), "name", self.name, "letters, digits, '-', '_' and '.'")
        check(
            self.data.image_size == self.model.input_shape[1] == self.model.input_shape[2],
            "data.image_size",
            self.data.image_size,
            f"the height and width of model.input_shape {self.model.input_shape}",
        )
        sparsity = self.sparsity
        if sparsity is None:
            if not self.prunes:
                off = "without a target (prune.flops_reduction and others), when nothing is pruned"
                self._check_unused(off, "prune.iterations", "prune.method", "train.distill")
            return
        for key in TARGETS.values():
            target = getattr(self.prune, key)
            check(target == 0, f"prune.{key}", target, "0 with sparsity, which removes no filters")
        off = "with sparsity, which removes no filters and measures no candidates"
        self._check_unused(off, "prune.method", "prune.iterations", "prune.round_to", "prune.prunes_per_iteration")
        self._check_unused(off, "search.reestimate_batchnorm")
        check(
            len(sparsity.all_stages) == 1 or self.prune.fine_tune_epochs > 0,
            "prune.fine_tune_epochs",
            self.prune.fine_tune_epochs,
            "at least 1 with several sparsity.stages: they are trained in between",
        )
        check(
            sparsity.from_run is None or self.train.pretrained is None,
            "train.pretrained",
            self.train.pretrained,
            "left out with sparsity.from_run, which brings its weights",
        )

    def _check_unused(self, off: str, *keys: str) -> None:
        for key in keys:
            section, name = key.split(".")
            part = getattr(self, section)
            default = getattr(type(part), name)  # a dataclass keeps plain defaults as class attributes
            check(getattr(part, name) == default, key, getattr(part, name), f"left at {default!r} {off}")

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned, filters or weights."""
        return self.sparsity is not None or bool(self.prune.targets)

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> RunConfig:
        """Raises ConfigError for an unknown or missing key or a value of the wrong type, naming it."""
        return build(RunConfig, with_current_names(data) if isinstance(data, Mapping) else data, "")
