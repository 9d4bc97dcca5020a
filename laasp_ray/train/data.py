"""What one rank reads: its loaders, which live as long as the worker does, and the images it could not read."""

from __future__ import annotations

from collections.abc import Collection

import torch

from laasp_ray.config import DataConfig
from laasp_ray.data.loader import make_loader
from laasp_ray.data.places import with_places
from laasp_ray.data.sources import open_source
from laasp_ray.records import Place


class SpellData:
    """The training and test images of rank `rank` of `world`, on `device`; `batch_size` is the
    global batch, `share` a rank's part of it."""

    def __init__(
        self,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        excluded: Collection[str] = (),
        places: Collection[Place] = (),
    ) -> None:
        self.device, self.rank, self.world = device, rank, world
        self._unreadable: list[str] = []
        train = with_places(open_source(config, "train"), "train", places)
        test = with_places(open_source(config, "test"), "test", places)
        self.train_images, self.test_images = len(train), len(test)
        self.share = share = -(-batch_size // world)
        self.train_loader = make_loader(
            train,
            config,
            training=True,
            device=device,
            max_batch=share,
            seed=seed,
            excluded=excluded,
            on_unreadable=self._unreadable.append,
        )
        self.test_loader = make_loader(
            test,
            config,
            training=False,
            device=device,
            max_batch=share,
            seed=seed,
            excluded=excluded,
            on_unreadable=self._unreadable.append,
        )

    def in_format(self, images: torch.Tensor) -> torch.Tensor:
        """Channels last on a GPU, where convolutions are faster that way."""
        return images.contiguous(memory_format=torch.channels_last) if self.device.type == "cuda" else images

    def take_unreadable(self) -> tuple[str, ...]:
        """The images found unreadable since this was last called."""
        taken = tuple(self._unreadable)
        self._unreadable.clear()
        return taken

    def close(self) -> None:
        self.train_loader.close()
        self.test_loader.close()
