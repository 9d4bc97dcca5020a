"""Computes the crop of each image. All loaders use the same numbers, so their geometry is equal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from laasp_ray.config import DataConfig
from laasp_ray.data.ordering import Windows, windows

LONGEST = 16
"""The longest side of an image in evaluation, as a multiple of its shorter side. Longer images are cut to their centre
first, which moves the result by at most half a pixel from torchvision's.
"""


@dataclass(frozen=True)
class Placement:
    """The resizing and cropping of each image of a batch.

    Training with random_resized_crop: the window is cut out and then resized to `image_size` (`resized` is None).
    Otherwise: the image is resized to `resized` ((n, 2) heights and widths; its own size means no resizing), and then
    the window of `image_size` is cut out, with zeros outside the image.
    """

    windows: Windows
    resized: np.ndarray | None


def place(
    indices: np.ndarray, sizes: np.ndarray, *, config: DataConfig, training: bool, seed: int, epoch: int
) -> Placement:
    """The placement of images `indices` (n,) with `sizes` (n, 2): heights and widths in pixels."""
    if not training:
        return centre(sizes, config)
    drawn = windows(indices, sizes, config=config, seed=seed, epoch=epoch)
    return Placement(windows=drawn, resized=sizes if config.train_transform == "pad_crop" else None)


def longest_side(config: DataConfig, *, training: bool) -> int | None:
    """The longest side of an image as a multiple of its shorter side, or None. Longer images are cut to their centre
    first.

    If the shorter side is resized, an image one pixel high would grow to gigabytes, and all but the centre is cut away
    later.
    """
    return LONGEST if config.eval_resize and not training else None


def centre(sizes: np.ndarray, config: DataConfig) -> Placement:
    """The placement for evaluation, equal to torchvision's Resize(eval_resize) and CenterCrop(image_size) to
    the pixel.
    """
    sizes = np.asarray(sizes, np.int64)
    resized = _shorter_side(sizes, config.eval_resize) if config.eval_resize else sizes
    side = config.image_size
    # Half pixels: if the image is large enough, the window's start is rounded to even. If rows are missing, the smaller
    # half of them is on top.
    first = np.where(resized >= side, np.rint((resized - side) / 2).astype(np.int64), -((side - resized) // 2))
    full = np.full(len(sizes), side, np.int64)
    drawn = Windows(y=first[:, 0], x=first[:, 1], height=full, width=full, flip=np.zeros(len(sizes), bool))
    return Placement(windows=drawn, resized=resized)


def _shorter_side(sizes: np.ndarray, wanted: int) -> np.ndarray:
    shorter, longer = sizes.min(axis=1), sizes.max(axis=1)
    scaled = (wanted * longer) // shorter
    tall = sizes[:, 0] > sizes[:, 1]
    return np.stack([np.where(tall, scaled, wanted), np.where(tall, wanted, scaled)], axis=1)
