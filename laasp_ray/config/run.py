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
from laasp_ray.config.fields import Doc, build, check, doc_of, docs, to_plain
from laasp_ray.config.methods import SECTIONS, build_section, known_to
from laasp_ray.config.model import ModelConfig
from laasp_ray.config.prune import PruneConfig
from laasp_ray.config.search import SearchConfig
from laasp_ray.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run. When it is resumed some keys may differ (config/compat.py), nothing else may.

    `prune` is the section of its method (config/methods.py). A run of a method that removes filters prunes nothing
    without a target: it trains by the whole schedule, or given weights from the prune epoch on.
    """

    name: Annotated[str, Doc("the run's name; the same name goes on with the run")]
    model: ModelConfig
    data: DataConfig
    prune: PruneConfig
    train: TrainConfig
    search: SearchConfig = field(default_factory=SearchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
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
        self.prune.check_beside(self)

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned, filters or weights."""
        return self.prune.prunes

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> RunConfig:
        """Raises ConfigError for an unknown or missing key or a value of the wrong type, naming it."""
        if isinstance(data, Mapping):
            data = with_current_names(data)
            if "prune" in data:
                data = {**data, "prune": build_section(data["prune"])}
        return build(RunConfig, data, "")


def doc_of_key(key: str) -> str:
    """The line of a dotted key of a run; of a key of `prune`, as the first method that has it says it. Empty: none."""
    section, _, name = key.partition(".")
    owners = known_to(name) if section == "prune" else []
    return docs(SECTIONS[owners[0]])[name] if owners else doc_of(RunConfig, key)
