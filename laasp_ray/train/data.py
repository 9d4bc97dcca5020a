"""The data of one rank: its loaders, which live as long as the worker, and the images that it could not read."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from laasp_ray.config import DataConfig
from laasp_ray.data.examples.loader import ExampleLoader
from laasp_ray.data.examples.source import Examples
from laasp_ray.data.loaders.registry import Loader, make_loader
from laasp_ray.data.sources.base import SPLITS, ImageSource
from laasp_ray.data.sources.identity import digest_of_names
from laasp_ray.data.sources.places import with_places
from laasp_ray.data.sources.registry import open_source
from laasp_ray.records import Place
from laasp_ray.tasks import CLASSIFICATION, Task


class EvaluationData:
    """The images `test` for rank `rank` of `world`, on `device`.

    `batch_size` is the global batch. In training it is cut into `parts` (by default one for each rank); `own_parts` are
    this rank's, and `share` is the number of images in the largest part. `task` is what the images are for; its
    modules are moved to `device`.
    """

    def __init__(
        self,
        test: ImageSource | Examples,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        parts: int | None = None,
        excluded: Collection[str] = (),
        task: Task = CLASSIFICATION,
    ) -> None:
        self.task = task.to(device)
        self.device, self.rank, self.world = device, rank, world
        self.parts = parts or world
        self.share = -(-batch_size // self.parts)
        self._config, self._seed, self._excluded = config, seed, excluded
        self._unreadable: list[str] = []
        self.test_images = len(test)
        self.test_loader = self._loader(test, training=False)

    @property
    def own_parts(self) -> Sequence[int]:
        return range(self.rank, self.parts, self.world)

    def take_unreadable(self) -> tuple[str, ...]:
        """The images found unreadable since the last call."""
        taken = tuple(self._unreadable)
        self._unreadable.clear()
        return taken

    def close(self) -> None:
        self.test_loader.close()

    def _loader(self, source: ImageSource | Examples, *, training: bool) -> Loader:
        if isinstance(source, Examples):
            return ExampleLoader(source, device=self.device, seed=self._seed, workers=self._config.workers)
        return make_loader(
            source,
            self._config,
            training=training,
            device=self.device,
            max_batch=self.share,
            seed=self._seed,
            excluded=self._excluded,
            on_unreadable=self._unreadable.append,
        )


class PhaseData(EvaluationData):
    """The training and test images of a rank. `places` are those of images that were left out."""

    def __init__(
        self,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        parts: int | None = None,
        excluded: Collection[str] = (),
        places: Collection[Place] = (),
        task: Task = CLASSIFICATION,
    ) -> None:
        train, test = open_splits(config, task, places)
        super().__init__(
            test,
            config,
            batch_size=batch_size,
            seed=seed,
            device=device,
            rank=rank,
            world=world,
            parts=parts,
            excluded=excluded,
            task=task,
        )
        self._sources = (train, test)
        self.train_images = len(train)
        self.train_loader = self._loader(train, training=True)

    def digest(self) -> tuple[str, str]:
        """The digests of the training and the test images (see `digest_of_split`)."""
        train, test = map(digest_of_split, self._sources)
        return train, test

    def close(self) -> None:
        self.train_loader.close()
        super().close()


def open_splits(
    config: DataConfig, task: Task, places: Collection[Place] = ()
) -> tuple[ImageSource | Examples, ImageSource | Examples]:
    """The training and the test data of a task: its own, or images as `config` says."""
    if task.data is not None:
        return task.data.open("train"), task.data.open("test")
    train, test = (with_places(open_source(config, split), split, places) for split in SPLITS)
    return train, test


def digest_of_split(source: ImageSource | Examples) -> str:
    """The digest of names, labels and order; of an own data set that of its identity, which reads a few examples."""
    return str(source.identity()["digest"]) if isinstance(source, Examples) else digest_of_names(source)
