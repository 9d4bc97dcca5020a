"""Chooses the loader of a run, and makes it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from laasp_ray.config import DataConfig, LoaderName
from laasp_ray.data.loaders.pillow import TorchvisionLoader
from laasp_ray.data.loaders.reading import Batch, UnreadableImages
from laasp_ray.data.sources.base import ImageSource
from laasp_ray.errors import ConfigError

logger = logging.getLogger(__name__)

__all__ = ["Batch", "Loader", "check_available", "make_loader"]


class Loader(Protocol):
    """Decodes batches of a source, for many epochs. `name` is "dali-cpu", "dali-gpu", "torchvision" or "the data set
    itself".

    `in_background` says whether batches may be prepared in a thread of their own.
    """

    name: str
    in_background: bool

    def epoch(self, batches: Sequence[np.ndarray], epoch: int = 0) -> Iterator[Batch]:
        """The images of `batches` (index arrays), in order. `epoch` affects only the training augmentation.

        Unreadable images are left out, and a batch without any readable image is skipped. An iterator need not be
        finished; the next call starts from the beginning. Raises DataError if more than data.max_unreadable images are
        unreadable.
        """
        ...

    def close(self) -> None:
        """Frees threads and memory. The loader cannot be used afterwards."""
        ...


def make_loader(
    source: ImageSource,
    config: DataConfig,
    *,
    training: bool,
    device: torch.device,
    max_batch: int,
    seed: int = 0,
    uint8: bool = False,
    excluded: Collection[str] = (),
    on_unreadable: Callable[[str], None] | None = None,
) -> Loader:
    """A loader over `source` for batches of at most `max_batch` images, delivered on `device`.

    With `training` each image is augmented as a function of (`seed`, epoch, image). Otherwise the centre is cropped.
    Images are normalised float32, or with `uint8` not normalised. Images named in `excluded` are left out from the
    start. `on_unreadable` is called with the name of each image found later. DALI is used if it can be imported, unless
    `data.loader` says otherwise; a log line names the loader. Raises ConfigError if `data.loader` is dali and DALI is
    missing, DataError if too many images are excluded.
    """
    unreadable = UnreadableImages(source, config.max_unreadable, excluded, on_unreadable)
    make: Callable[..., Loader] = _loader_class(config.loader)
    loader = make(
        source, config, unreadable, training=training, device=device, max_batch=max_batch, seed=seed, uint8=uint8
    )
    _say_once(loader.name, config.loader)
    return loader


def check_available(wanted: LoaderName) -> None:
    """Raises ConfigError if the loader `wanted`, as in `data.loader`, is not available in this process."""
    _loader_class(wanted)


def _loader_class(wanted: str) -> Callable[..., Loader]:
    if wanted == "torchvision":
        return TorchvisionLoader
    problem = _dali_problem()
    if problem is None:
        from laasp_ray.data.loaders.dali import DaliLoader

        return DaliLoader
    if wanted == "dali":
        raise ConfigError(
            f"data.loader is 'dali', but DALI cannot be imported ({problem}); install nvidia-dali-cuda130 (Linux), or "
            "set data.loader to 'auto' or 'torchvision'"
        )
    return TorchvisionLoader


@functools.cache
def _dali_problem() -> str | None:
    """The reason why DALI cannot be used, or None if it can."""
    try:
        import laasp_ray.data.loaders.dali  # noqa: F401
    except (ImportError, OSError) as error:  # an OSError means that a shared library is missing
        return str(error)
    return None


@functools.cache
def _say_once(name: str, wanted: str) -> None:
    if wanted != "auto":
        why = f"data.loader is {wanted!r}"
    elif name == "torchvision":
        why = f"DALI cannot be imported: {_dali_problem()}"
    else:
        why = "DALI is installed"
    logger.info("images are decoded by %s (%s)", name, why)
