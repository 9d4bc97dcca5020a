"""A run's config as frozen dataclasses. Shapes and ranges are checked here; an unknown key is an error.

`RunConfig.to_dict` and `from_dict` are inverses. The dictionary is the content of a run's `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from laasp_ray.config.cluster import ClusterConfig
from laasp_ray.config.compat import with_current_names
from laasp_ray.config.data import DataConfig
from laasp_ray.config.export import ExportConfig
from laasp_ray.config.fields import Doc, build, check, check_types, doc_of, docs, to_plain
from laasp_ray.config.methods import SECTIONS, build_section, known_to
from laasp_ray.config.model import ModelConfig
from laasp_ray.config.prune import PruneConfig
from laasp_ray.config.search import SearchConfig
from laasp_ray.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run. A resumed run may change some keys (config/compat.py), but no others.

    `prune` is the section of the run's method (config/methods.py). Without a target, a method that removes filters
    prunes nothing: the network is trained for the whole schedule, or from the prune epoch on if weights are given.
    """

    name: Annotated[str, Doc("the run's name; the same name goes on with the run")]
    model: ModelConfig
    data: DataConfig
    prune: PruneConfig
    train: TrainConfig
    search: SearchConfig = field(default_factory=SearchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    storage: Annotated[str, Doc("where runs are kept: a folder, or an s3:// or gs:// address")] = "runs"
    seed: Annotated[int, Doc("the one source of randomness")] = 0

    def __post_init__(self) -> None:
        check_types(self, "")
        plain = self.name.replace("-", "").replace("_", "").replace(".", "")
        check(plain.isalnum() and self.name[0].isalnum(), "name", self.name, "letters, digits, '-', '_' and '.'")
        check(
            bool(self.data.factory) or self.data.image_size == self.model.input_shape[1] == self.model.input_shape[2],
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
        """Builds the config. Raises ConfigError for an unknown or missing key or a value of the wrong type; the message
        names the key.
        """
        if isinstance(data, Mapping):
            data = with_current_names(data)
            if "prune" in data:
                data = {**data, "prune": build_section(data["prune"])}
        return build(RunConfig, data, "")


def doc_of_key(key: str) -> str:
    """The Doc text of a dotted key of a run; empty if there is none. For `prune`, the first method that has the key
    gives the text.
    """
    section, _, name = key.partition(".")
    owners = known_to(name) if section == "prune" else []
    return docs(SECTIONS[owners[0]])[name] if owners else doc_of(RunConfig, key)
