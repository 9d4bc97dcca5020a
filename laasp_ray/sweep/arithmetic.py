"""What the numbers of a sweep depend on beside its settings, to the last bit. Its first event keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from laasp_ray.config import ClusterConfig
from laasp_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """`workers` are the trainers of a run and `threads` those of each (0 on a GPU); without Ray a run has none of them.
    A run's driver, which scores filters, has `driver_threads`.
    """

    ray: bool
    workers: int
    threads: int
    driver_threads: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(cluster: ClusterConfig | None, *, gpus: bool = False) -> Arithmetic:
        """That of runs with this section `cluster`, in which nothing is left open; None: without Ray."""
        driver = torch.get_num_threads()
        if cluster is None:
            return Arithmetic(ray=False, workers=1, threads=driver, driver_threads=driver)
        return Arithmetic(
            ray=True, workers=cluster.workers, threads=0 if gpus else cluster.threads, driver_threads=driver
        )

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Arithmetic:
        return Arithmetic(**data)

    def kept_by(self, cluster: ClusterConfig, name: str, *, ray: bool) -> ClusterConfig:
        """The section `cluster` of a sweep `name` that goes on: what it leaves open is as the sweep began.

        Raises ConfigError, naming the keys, if it asks for something else.
        """
        differ = [] if ray == self.ray else [f"--no-ray: {_given(not self.ray)} there, {_given(not ray)} here"]
        if ray and self.ray:
            pairs = (
                ("cluster.workers (--workers)", self.workers, cluster.workers),
                ("cluster.threads", self.threads, self.threads and cluster.threads),
            )
            differ += [f"{key}: {there} there, {here} here" for key, there, here in pairs if here and here != there]
        if differ:
            raise ConfigError(
                f"the sweep {name!r} was started with {'; '.join(differ)}, which changes its numbers: leave that out "
                "to go on with it as it began, or give another --name"
            )
        return replace(cluster, workers=self.workers, threads=self.threads) if ray else cluster

    @contextmanager
    def of_driver(self) -> Iterator[None]:
        """This process has the driver's threads as long as the context lasts."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.driver_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _given(is_given: bool) -> str:
    return "given" if is_given else "not given"
