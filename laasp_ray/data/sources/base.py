"""The interface of every data format, and the checks of a data set."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal, Protocol

import numpy as np

from laasp_ray.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""The suffixes of torchvision's ImageFolder, in any case. DALI and Pillow decode all of them."""
_JUNK = {"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "lost+found", "System Volume Information"}

Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")


class ImageSource(Protocol):
    """The images of one split. `labels` are int64 (n,); `classes` are the names that labels index."""

    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """The number of images. A subclass need not define it."""
        return len(self.labels)

    def read(self, index: int) -> bytes:
        """The encoded image, in a format that DALI and Pillow decode. Raises OSError if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """The image's name in logs and in lists of excluded images. It is unique over both splits."""
        ...


def check_labels(labels: np.ndarray, classes: tuple[str, ...], *, split: Split, where: str) -> None:
    """Raises DataError if there are no images, a label is not a class, or a class has no training image."""
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


def check_splits(train: ImageSource, test: ImageSource, where: str) -> None:
    """Raises DataError if a label means another class in one split than in the other, or exists only in one.

    Classes without stored names are called by their numbers. For them only the ranges can be compared.
    """
    most = int(test.labels.max())
    if most >= len(train.classes):
        raise DataError(
            f"the splits in {where} do not fit: the test images have labels up to {most}, the training images "
            f"{len(train.classes)} classes (0 to {len(train.classes) - 1}); use splits of the same data set"
        )
    if test.classes == train.classes:
        return
    if _numbered(train.classes) or _numbered(test.classes):
        if not (_numbered(train.classes) and _numbered(test.classes)):
            logger.warning("one split in %s has no names of classes: the order of its labels is taken as given", where)
        return
    raise DataError(
        f"the splits in {where} do not fit: {_difference(train.classes, test.classes)}; both must have the same "
        "classes in the same order"
    )


def check_outputs(test: ImageSource, outputs: int, where: str) -> None:
    """Raises DataError if the classes of the images do not match a network with so many `outputs`."""
    most = int(test.labels.max())
    if most >= outputs or (len(test.classes) != outputs and not _numbered(test.classes)):
        classes = max(len(test.classes), most + 1)
        raise DataError(
            f"the network has {outputs} outputs, the images in {where} are of {classes} classes: give the data set "
            "that the network was trained on"
        )


def check_classes(test: ImageSource, classes: tuple[str, ...] | None, where: str) -> None:
    """Raises DataError if the test images' classes differ from `classes`, those that a network was trained on.

    The check is made only if both are known by name.
    """
    if classes is None or _numbered(classes) or _numbered(test.classes) or test.classes == classes:
        return
    raise DataError(
        f"the images in {where} are not of the run's classes: {_difference(classes, test.classes)}; give images of the "
        "same classes in the same order"
    )


def is_junk(name: str) -> bool:
    """Whether a file or folder belongs to the system and is not data: hidden (`._x.jpg`), or a name such as
    `__MACOSX`.
    """
    return name.startswith(".") or name in _JUNK


def is_image(name: str) -> bool:
    """Whether a file is an image by its suffix, in any case."""
    return name.lower().endswith(SUFFIXES)


def tell_skipped(where: str, names: Sequence[str]) -> None:
    """Logs once per process how many files are not images that can be read, with their suffixes and the first names."""
    if names:
        kinds = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in names)
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        _warn_once(f"{len(names)} files in {where} are not read ({counted}): {', '.join(sorted(names)[:5])}")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s; images are %s", message, ", ".join(SUFFIXES))


def _numbered(classes: tuple[str, ...]) -> bool:
    return classes == tuple(map(str, range(len(classes))))


def _difference(train: tuple[str, ...], test: tuple[str, ...]) -> str:
    only_train, only_test = [[name for name in a if name not in b] for a, b in ((train, test), (test, train))]
    if only_train or only_test:
        return (
            f"{len(only_train)} of {len(train)} training classes are none of the test images' "
            f"({', '.join(only_train[:5]) or 'none'}), {len(only_test)} of {len(test)} the other way round "
            f"({', '.join(only_test[:5]) or 'none'})"
        )
    place = next((n for n, (a, b) in enumerate(zip(train, test, strict=False)) if a != b), min(len(train), len(test)))
    ours, theirs = (classes[place] if place < len(classes) else "nothing" for classes in (train, test))
    return f"label {place} is {ours!r} in training and {theirs!r} in the test images"
