"""The order and the augmentation of images, as functions of (seed, epoch, image) without a generator's state.

Every random number is a hash of its purpose. So any process can compute any image's numbers alone, and they do not
depend on the batch size, the number of ranks or a restart.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laasp_ray.config import DataConfig
from laasp_ray.errors import DataError

ATTEMPTS = 10
"""The number of tries for a random window before the centre is taken, as in torchvision's RandomResizedCrop."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64: Steele, Lea, Flood, OOPSLA 2014


@dataclass(frozen=True)
class Windows:
    """A window per image, in pixels: first row `y` and column `x`, `height`, `width` (int64, (n,)), and `flip` (bool).

    `y` and `x` may be negative, and a window may extend beyond the image. Pixels outside the image are zero.
    """

    y: np.ndarray
    x: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


def derive_seed(seed: int, name: str) -> int:
    """The seed (0 <= s < 2**63) of the draw called `name` in a run with `seed`. It is the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def hash_uint64(key: int, values: np.ndarray) -> np.ndarray:
    """One well-mixed uint64 per entry of `values` (non-negative integers, any shape) under `key` (>= 0)."""
    with np.errstate(over="ignore"):  # the overflow is intended: arithmetic is modulo 2**64
        return _splitmix64(values.astype(np.uint64) * _GOLDEN ^ _splitmix64(np.array([key], np.uint64)))


def epoch_batches(n: int, *, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The global batches of a training epoch. Each of `n` images occurs once, in an order that depends only on (seed,
    epoch).

    The order is cut into ceil(n / batch_size) batches whose sizes differ by at most one, so the last batch is never
    tiny. Returns int64 index arrays.
    """
    _check_batching(n, batch_size)
    order = shuffled(n, derive_seed(seed, f"order/{epoch}"))
    return np.array_split(order, math.ceil(n / batch_size))


def rank_share(batch: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The images of a global batch that `rank` of `world` processes trains on. Sizes differ by at most one."""
    _check_rank(rank, world)
    return batch[rank::world]


def eval_batches(n: int, *, batch_size: int, rank: int, world: int) -> list[np.ndarray]:
    """This rank's batches (at most `batch_size` images each) of an evaluation. Each image occurs once over all ranks.

    Ranks may get different numbers of batches, and the last batch may be partial. With fewer images than ranks some
    ranks get none.
    """
    _check_batching(n, batch_size)
    _check_rank(rank, world)
    share = np.arange(n, dtype=np.int64)[rank::world]
    return [share[first : first + batch_size] for first in range(0, len(share), batch_size)]


def shuffled(n: int, key: int) -> np.ndarray:
    """A permutation of 0..n-1 (int64), determined by `key` alone."""
    return np.argsort(hash_uint64(key, np.arange(n, dtype=np.int64)), kind="stable").astype(np.int64)


def windows(
    indices: np.ndarray, sizes: np.ndarray | Sequence[tuple[int, int]], *, config: DataConfig, seed: int, epoch: int
) -> Windows:
    """The training augmentation of each image, a function of (seed, epoch, image index) and the image's size.

    `indices` is (n,), `sizes` (n, 2): heights and widths in pixels. `random_resized_crop` draws as torchvision's
    RandomResizedCrop: a share of the area, a log-uniform aspect ratio, and the centre after ten tries that do not fit.
    `pad_crop` draws as torchvision's RandomCrop with padding. Raises DataError if a padded image is smaller than the
    window.
    """
    indices = np.asarray(indices, np.int64)
    shapes = np.asarray(sizes, np.int64).reshape(-1, 2)
    key = derive_seed(seed, f"augmentation/{epoch}")
    flip = _uniform(key, indices, 0) < config.flip
    if config.train_transform == "pad_crop":
        return _pad_crop(key, indices, shapes, flip, config)
    return _random_resized_crop(key, indices, shapes, flip, config)


def _pad_crop(key: int, indices: np.ndarray, sizes: np.ndarray, flip: np.ndarray, config: DataConfig) -> Windows:
    side = config.image_size
    choices = sizes + 2 * config.pad - side + 1
    if (choices < 1).any():
        first = int(np.flatnonzero((choices < 1).any(axis=1))[0])
        raise DataError(
            f"image number {indices[first]} is {sizes[first, 0]} x {sizes[first, 1]} pixels: with data.pad "
            f"{config.pad} still smaller than data.image_size {side}; use a larger data.pad, or train_transform "
            "random_resized_crop"
        )
    y = (_uniform(key, indices, 1) * choices[:, 0]).astype(np.int64) - config.pad
    x = (_uniform(key, indices, 2) * choices[:, 1]).astype(np.int64) - config.pad
    full = np.full(len(indices), side, np.int64)
    return Windows(y=y, x=x, height=full, width=full.copy(), flip=flip)


def _random_resized_crop(
    key: int, indices: np.ndarray, sizes: np.ndarray, flip: np.ndarray, config: DataConfig
) -> Windows:
    image_height, image_width = sizes[:, 0], sizes[:, 1]
    y, x, height, width = _centre_fallback(image_height, image_width, config.ratio)
    open_ = np.ones(len(indices), bool)
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    for attempt in range(ATTEMPTS):
        draws = [_uniform(key, indices, 1 + 4 * attempt + number) for number in range(4)]
        area = image_height * image_width * (config.scale[0] + draws[0] * (config.scale[1] - config.scale[0]))
        ratio = np.exp(low + draws[1] * (high - low))
        tried_width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        tried_height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (tried_width > 0) & (tried_width <= image_width) & (tried_height > 0) & (tried_height <= image_height)
        taken = open_ & fits
        height[taken], width[taken] = tried_height[taken], tried_width[taken]
        y[taken] = (draws[2] * (image_height - tried_height + 1)).astype(np.int64)[taken]
        x[taken] = (draws[3] * (image_width - tried_width + 1)).astype(np.int64)[taken]
        open_ &= ~fits
        if not open_.any():
            break
    return Windows(y=y, x=x, height=height, width=width, flip=flip)


def _centre_fallback(
    image_height: np.ndarray, image_width: np.ndarray, ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The largest centred window whose aspect ratio (width / height) is within `ratio`: y, x, height, width."""
    aspect = image_width / image_height
    height = np.where(aspect < ratio[0], np.rint(image_width / ratio[0]).astype(np.int64), image_height)
    width = np.where(aspect > ratio[1], np.rint(image_height * ratio[1]).astype(np.int64), image_width)
    return (image_height - height) // 2, (image_width - width) // 2, height, width


def _uniform(key: int, indices: np.ndarray, draw: int) -> np.ndarray:
    """float64 in [0, 1) for draw number `draw` of each image."""
    with np.errstate(over="ignore"):
        mixed = _splitmix64(hash_uint64(key, indices) + np.uint64(draw) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(z: np.ndarray) -> np.ndarray:
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _check_batching(n: int, batch_size: int) -> None:
    if n < 1 or batch_size < 1:
        raise ValueError(f"{n} images in batches of {batch_size}: both must be at least 1")


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}: must be from 0 to below the number of ranks")
