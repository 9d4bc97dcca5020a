"""What every format of a data set gives, and what is checked of it."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from laasp_ray.errors import DataError

Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")


class ImageSource(Protocol):
    """The images of one split: `labels` int64 (n,), `classes` the names that labels index."""

    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded image, in a format that DALI and Pillow decode; OSError if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What the image is called in logs and in lists of excluded images; differs between splits too."""
        ...


def check_labels(labels: np.ndarray, classes: tuple[str, ...], *, split: Split, where: str) -> None:
    """Raises DataError when there are no images, a label is no class, or a class has no training image."""
    if len(labels) == 0:
        raise DataError(f"{where} has no images")
    if labels.min() < 0 or labels.max() >= len(classes):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        row = int(np.flatnonzero(labels == wrong)[0])
        raise DataError(
            f"{where}: image number {row} has the label {wrong}, of {len(classes)} classes (0 to {len(classes) - 1})"
        )
    if split == "train":
        empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
        if len(empty):
            named = ", ".join(classes[index] for index in empty[:5])
            raise DataError(
                f"{where} has no training image of {len(empty)} of its {len(classes)} classes ({named}); "
                "add images or remove the classes"
            )
