"""Which loader a run uses, and the one way to make it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from laasp_ray.config import DataConfig, LoaderName
from laasp_ray.data.loaders.pillow import TorchvisionLoader
from laasp_ray.data.loaders.reading import Batch, UnreadableImages, normalise
from laasp_ray.data.sources.base import ImageSource
from laasp_ray.errors import ConfigError

logger = logging.getLogger(__name__)

__all__ = ["Batch", "Loader", "check_available", "make_loader", "normalise"]


class Loader(Protocol):
    """Decodes batches of a source; lives for many epochs. `name` is "dali-cpu", "dali-gpu" or "torchvision"."""

    name: str

    def epoch(self, batches: Sequence[np.ndarray], epoch: int = 0) -> Iterator[Batch]:
        """The images of `batches` (index arrays), in order; `epoch` matters for the training augmentation only.

        Unreadable images are left out; a batch of which nothing is left is skipped. An iterator may be broken off:
        the next call starts afresh. Raises DataError when more than data.max_unreadable images are unreadable.
        """
        ...

    def close(self) -> None:
        """Frees threads and memory; the loader cannot be used afterwards."""
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

    With `training` each image is augmented as a function of (`seed`, epoch, image); otherwise the centre is taken.
    Images come as normalised float32, with `uint8` as they were before. Images named in `excluded` are left out from
    the start, and `on_unreadable` gets the name of each further one. DALI is used where it can be imported unless
    `data.loader` says otherwise; the log says which. Raises ConfigError for `data.loader` dali without DALI, DataError
    when too many images are excluded.
    """
    unreadable = UnreadableImages(source, config.max_unreadable, excluded, on_unreadable)
    make: Callable[..., Loader] = _loader_class(config.loader)
    loader = make(
        source, config, unreadable, training=training, device=device, max_batch=max_batch, seed=seed, uint8=uint8
    )
    _say_once(loader.name, config.loader)
    return loader


def check_available(wanted: LoaderName) -> None:
    """Raises ConfigError if `wanted`, as in `data.loader`, cannot be had in this process."""
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
    """Why DALI cannot be used, or None if it can."""
    try:
        import laasp_ray.data.loaders.dali  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a shared library that the wheel needs is missing
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
