"""The data of one rank: its loaders, which live as long as the worker, and the images that it could not read."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from laasp_ray.config import DataConfig
from laasp_ray.data.loaders.registry import Loader, make_loader
from laasp_ray.data.sources.base import ImageSource
from laasp_ray.data.sources.identity import digest_of_names
from laasp_ray.data.sources.places import with_places
from laasp_ray.data.sources.registry import open_source
from laasp_ray.records import Place


class EvaluationData:
    """The images `test` for rank `rank` of `world`, on `device`.

    `batch_size` is the global batch. In training it is cut into `parts` (by default one for each rank); `own_parts` are
    this rank's, and `share` is the number of images in the largest part.
    """

    def __init__(
        self,
        test: ImageSource,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        parts: int | None = None,
        excluded: Collection[str] = (),
    ) -> None:
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

    def _loader(self, source: ImageSource, *, training: bool) -> Loader:
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
    ) -> None:
        train = with_places(open_source(config, "train"), "train", places)
        test = with_places(open_source(config, "test"), "test", places)
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
        )
        self._sources = (train, test)
        self.train_images = len(train)
        self.train_loader = self._loader(train, training=True)

    def digest(self) -> tuple[str, str]:
        """The digests of the names, labels and order of the training and the test images."""
        train, test = (digest_of_names(source) for source in self._sources)
        return train, test

    def close(self) -> None:
        self.train_loader.close()
        super().close()
