"""Where each image's pixels go: the same numbers for every loader, so that their geometry cannot differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from laasp_ray.config import DataConfig
from laasp_ray.data.ordering import Windows, windows

LONGEST = 16
"""How many times its shorter side an image may be long in evaluation; the centre of longer ones is at most half a pixel
from where torchvision has it."""


@dataclass(frozen=True)
class Placement:
    """What to do with each image of a batch.

    Training with random_resized_crop: cut the window out, then resize it to `image_size` (`resized` is None).
    Otherwise: resize the image to `resized` ((n, 2) heights and widths; its own size means no resizing), then cut the
    window, of `image_size`, with zeros for what lies outside.
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
    """How many times its shorter side an image may be long; of longer ones the centre is taken first.

    Where the shorter side is resized, a line of pixels would be blown up to gigabytes of which all but the centre is
    then cut away.
    """
    return LONGEST if config.eval_resize and not training else None


def centre(sizes: np.ndarray, config: DataConfig) -> Placement:
    """Evaluation as torchvision's Resize(eval_resize) and CenterCrop(image_size) do it, to the pixel."""
    sizes = np.asarray(sizes, np.int64)
    resized = _shorter_side(sizes, config.eval_resize) if config.eval_resize else sizes
    side = config.image_size
    # Half pixels: rounded to the even row where there is more than enough, and where rows are missing the smaller
    # half of them goes on top.
    first = np.where(resized >= side, np.rint((resized - side) / 2).astype(np.int64), -((side - resized) // 2))
    full = np.full(len(sizes), side, np.int64)
    drawn = Windows(y=first[:, 0], x=first[:, 1], height=full, width=full, flip=np.zeros(len(sizes), bool))
    return Placement(windows=drawn, resized=resized)


def _shorter_side(sizes: np.ndarray, wanted: int) -> np.ndarray:
    shorter, longer = sizes.min(axis=1), sizes.max(axis=1)
    scaled = (wanted * longer) // shorter
    tall = sizes[:, 0] > sizes[:, 1]
    return np.stack([np.where(tall, scaled, wanted), np.where(tall, wanted, scaled)], axis=1)
