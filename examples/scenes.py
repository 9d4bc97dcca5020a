"""Small pictures of several handwritten digits, from those that laasp_ray embeds: the data of the other examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from laasp_ray.data.sources.digits import read_digits

SIDE, DIGIT = 32, 8
"""Pixels of a picture's and of a digit's side. A digit lies in one of 3 x 3 places, moved by up to 2 pixels."""
_PLACES, _PITCH, _SHIFT = 3, 10, 3


@dataclass(frozen=True)
class Scene:
    """`picture` float32 (1, SIDE, SIDE) from 0 to 1; each digit's `labels` (n,) and its `corners` (n, 2), x and y."""

    picture: np.ndarray
    labels: np.ndarray
    corners: np.ndarray


class Scenes:
    """`count` scenes with 1 to `most` digits each. A scene is a function of (split, index), so all processes agree.

    Training and test scenes show different digits.
    """

    def __init__(self, split: str, count: int, most: int = 3) -> None:
        images, labels = read_digits()
        held_out = np.arange(len(labels)) % 5 == 4
        kept = held_out if split == "test" else ~held_out
        self._images, self._labels = images[kept].astype(np.float32) / 16, labels[kept].astype(np.int64)
        self._split, self._count, self._most = int(split == "test"), count, most

    def __len__(self) -> int:
        return self._count

    def scene(self, index: int) -> Scene:
        draw = np.random.default_rng([self._split, index])
        count = int(draw.integers(1, self._most + 1))
        chosen = draw.integers(len(self._labels), size=count)
        places = draw.permutation(_PLACES**2)[:count]
        corners = np.stack([places % _PLACES, places // _PLACES], 1) * _PITCH + draw.integers(0, _SHIFT, (count, 2))
        picture = np.zeros((1, SIDE, SIDE), np.float32)
        for digit, (x, y) in zip(chosen, corners, strict=True):
            picture[0, y : y + DIGIT, x : x + DIGIT] = self._images[digit]
        return Scene(picture, self._labels[chosen], corners)

    def picture(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.scene(index).picture)
