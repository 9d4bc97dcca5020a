"""The section `search`: how the candidates' losses are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from laasp_ray.config.fields import Doc, check, check_types

Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How the candidates' losses are measured: on training images that are drawn once per run.

    Reestimated BatchNorm statistics (search/batchnorm.py) are used for the losses of an iteration only; the network
    keeps its own.
    """

    images: Annotated[int, Doc("training images that a candidate's loss is measured on; all there are if fewer")] = 5000
    batch_size: Annotated[int, Doc("most images that go through the network at a time, at least 1")] = 250
    racing: Annotated[
        Literal["on", "off"], Doc("on drops candidates that are worse with confidence before they have seen all images")
    ] = "on"
    racing_error: Annotated[float, Doc("chance that racing drops the best candidate, below one half")] = 0.01
    racing_margin: Annotated[
        float, Doc("loss difference that does not matter in a race, as a share of the network's own loss; 0: none")
    ] = 0.0
    racing_growth: Annotated[
        float, Doc("factor by which a race's images grow from round to round, above 1, at most 10; large for many GPUs")
    ] = 1.6
    racing_memory: Annotated[
        Literal["on", "off"],
        Doc("on: after a prune without training, its losses stand for the pass without a prune, which is not measured"),
    ] = "on"
    precision: Annotated[
        Precision,
        Doc(
            "of the passes that measure losses: float32; tf32 on a GPU, which rounds to 10 bits; or bfloat16, which a "
            "race uses where it is precise enough"
        ),
    ] = "float32"
    memory_mb: Annotated[int, Doc("memory that one batch's values may take, MB; 0: a share of what is free")] = 0
    candidates_per_task: Annotated[int, Doc("most candidates of a unit of work on Ray; 0: sized by what they cost")] = 0
    reestimate_batchnorm: Annotated[
        bool, Doc("measure BatchNorm statistics anew on these images, in every iteration")
    ] = False

    @property
    def memory_bytes(self) -> int:
        """`memory_mb` in bytes; 0 stays 0."""
        return self.memory_mb * 1_000_000

    def __post_init__(self) -> None:
        check_types(self, "search.")
        check(self.images >= 1, "search.images", self.images, "at least 1")
        check(self.batch_size >= 1, "search.batch_size", self.batch_size, "at least 1")
        check(0 < self.racing_error < 0.5, "search.racing_error", self.racing_error, "a probability below one half")
        check(0 <= self.racing_margin < 1, "search.racing_margin", self.racing_margin, "a share from 0 to below 1")
        check(1 < self.racing_growth <= 10, "search.racing_growth", self.racing_growth, "above 1 and at most 10")
        check(self.memory_mb >= 0, "search.memory_mb", self.memory_mb, "at least 0")
        check(self.candidates_per_task >= 0, "search.candidates_per_task", self.candidates_per_task, "at least 0")
        enough = self.images >= 2 or not self.reestimate_batchnorm
        check(enough, "search.images", self.images, "at least 2 with search.reestimate_batchnorm: one has no variance")
