"""The calibration set: images that candidates' losses are measured on, drawn once, class-balanced, with fixed
augmentation.
"""

from __future__ import annotations

import bisect
import hashlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch

from laasp_ray.config import DataConfig
from laasp_ray.data.loaders.registry import make_loader
from laasp_ray.data.ordering import derive_seed, hash_uint64
from laasp_ray.data.sources.base import ImageSource
from laasp_ray.errors import DataError

logger = logging.getLogger(__name__)

DECODED_AT_ONCE = 64


@dataclass(frozen=True)
class CalibrationImages:
    """`images` uint8 (n, 3, H, W) after augmentation, not normalised; `labels` int64 (n,); `indices` (n,) into the
    source.

    `digest` is the sha256 of images and labels: equal digests mean equal sets.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: np.ndarray
    digest: str


def draw_calibration_images(
    source: ImageSource,
    config: DataConfig,
    *,
    images: int,
    seed: int,
    excluded: Collection[str] = (),
    on_unreadable: Callable[[str], None] | None = None,
) -> CalibrationImages:
    """Draws `images` training images, shuffled. All images are taken, with a log line, if there are fewer. Decodes on
    the CPU.

    Each class gives the same number, or one more, or all its images. The training augmentation is drawn once. The
    result depends only on the run's `seed` and on the set of unreadable images, which are replaced by others. An image
    found unreadable here has the same effect as its name in `excluded`, so a resumed run draws the same images. Raises
    DataError if too many images are unreadable.
    """
    own_seed = derive_seed(seed, "subset")
    left_out = set(excluded)

    def leave_out(name: str) -> None:
        left_out.add(name)
        if on_unreadable is not None:
            on_unreadable(name)

    loader = make_loader(
        source,
        config,
        training=True,
        device=torch.device("cpu"),
        max_batch=DECODED_AT_ONCE,
        seed=own_seed,
        uint8=True,
        excluded=excluded,
        on_unreadable=leave_out,
    )
    side = config.image_size
    try:
        while True:
            chosen = balanced_choice(source.labels, images, key=own_seed, unavailable=_indices_of(source, left_out))
            pixels = torch.empty((len(chosen), 3, side, side), dtype=torch.uint8)
            filled = 0
            for batch in loader.epoch(np.array_split(chosen, -(-len(chosen) // DECODED_AT_ONCE))):
                pixels[filled : filled + len(batch.indices)] = batch.images
                filled += len(batch.indices)
            if filled == len(chosen):  # otherwise the draw is repeated without the unreadable images
                break
    finally:
        loader.close()
    if len(chosen) < images:
        logger.info("the calibration set has %d images, %d were asked for: there are no more", len(chosen), images)
    labels = torch.from_numpy(source.labels[chosen])
    return CalibrationImages(pixels, labels, chosen, _digest(pixels, labels))


def balanced_choice(labels: np.ndarray, images: int, *, key: int, unavailable: Collection[int] = ()) -> np.ndarray:
    """Indices (int64) of `images` entries of `labels`, or of all if there are fewer: class-balanced, shuffled by `key`.

    Raises DataError if nothing is available.
    """
    available = np.setdiff1d(np.arange(len(labels), dtype=np.int64), np.array(sorted(unavailable), np.int64))
    if not len(available):
        raise DataError("no training image is left to draw the calibration set from: all are excluded as unreadable")
    counts = np.bincount(labels[available])
    quotas = class_quotas(counts, images, key=key)
    grouped = available[np.lexsort((hash_uint64(key, available), labels[available]))]
    place_in_class = np.arange(len(grouped)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = grouped[place_in_class < quotas[labels[grouped]]]
    return chosen[np.argsort(hash_uint64(derive_seed(key, "order"), chosen), kind="stable")]


def class_quotas(counts: np.ndarray, images: int, *, key: int) -> np.ndarray:
    """The number of images that each class gives (int64). `counts` is the number that each class has.

    A class with too few images gives all. The other classes give the same number or one more; `key` decides which.
    """
    wanted = min(images, int(counts.sum()))
    level = (
        bisect.bisect_right(range(int(counts.max()) + 1), wanted, key=lambda each: int(np.minimum(counts, each).sum()))
        - 1
    )
    quotas = np.minimum(counts, level).astype(np.int64)
    richer = np.flatnonzero(counts > level)
    order = richer[np.argsort(hash_uint64(derive_seed(key, "classes"), richer), kind="stable")]
    quotas[order[: wanted - int(quotas.sum())]] += 1
    return quotas


def _indices_of(source: ImageSource, names: Collection[str]) -> set[int]:
    return {index for index in range(len(source)) if source.name(index) in names} if names else set()


def _digest(images: torch.Tensor, labels: torch.Tensor) -> str:
    digest = hashlib.sha256(images.numpy().data)
    digest.update(labels.numpy().astype("<i8").data)
    return digest.hexdigest()
