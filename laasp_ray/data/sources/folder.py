"""A data set of class folders, the layout of the unpacked ILSVRC2012 archives."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from laasp_ray.data.sources.base import Split, check_labels, is_image, is_junk, tell_skipped
from laasp_ray.errors import DataError

TEST_FOLDERS = ("val", "test")


class FolderSource:
    """Images in `<root>/train/<class>/*.JPEG`; the test split is in `<root>/val` or `<root>/test` with the same layout.

    Classes are the sorted names of the training folders, unless `classes` is given. Images are sorted by class, then
    name; images in subfolders of a class are included. Opening lists the folders and reads no file. A log line counts
    the files that are not images.
    """

    def __init__(self, root: Path, split: Split, classes: tuple[str, ...] | None = None) -> None:
        self.classes = train_folders(root) if classes is None else classes
        folder = _split_folder(root, split)
        if split == "test":
            _check_test_classes(folder, self.classes)
        self._folder = folder
        counts, names, skipped = [], [], _beside_folders(folder)
        for name in self.classes:
            files, others = image_files(folder / name)
            counts.append(len(files))
            names.extend(files)
            skipped.extend(f"{name}/{os.fsdecode(other)}" for other in others)
        tell_skipped(str(folder), skipped)
        # An array of bytes needs a quarter of the memory of Python strings, and every worker opens the data set.
        self._names = np.array(names, dtype=np.bytes_)
        self.labels = np.repeat(np.arange(len(self.classes), dtype=np.int64), counts)
        check_labels(self.labels, self.classes, split=split, where=str(folder))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        return (self._folder / self._relative(index)).read_bytes()

    def name(self, index: int) -> str:
        return f"{self._folder.name}/{self._relative(index)}"

    def _relative(self, index: int) -> str:
        return f"{self.classes[self.labels[index]]}/{os.fsdecode(self._names[index])}"


def train_folders(root: Path) -> tuple[str, ...]:
    """The classes of a data set of folders. Raises DataError if there are none."""
    train = _split_folder(root, "train")
    classes = tuple(class_names(train))
    if not classes:
        raise DataError(f"no class folders in {train}; looked for {train}/<class>/*.JPEG")
    return classes


def class_names(folder: Path) -> list[str]:
    """The sorted names of the folders in `folder`, without those of the system (`is_junk`)."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not is_junk(entry.name) and entry.is_dir())


def _beside_folders(folder: Path) -> list[str]:
    """The files and other entries of `folder` that are not class folders."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if not is_junk(entry.name) and not entry.is_dir()]


def _split_folder(root: Path, split: Split) -> Path:
    candidates = [root / name for name in (("train",) if split == "train" else TEST_FOLDERS)]
    for folder in candidates:
        if folder.is_dir():
            return folder
    looked = " or ".join(f"{folder}/<class>" for folder in candidates)
    raise DataError(f"no {split} images in {root}; looked for {looked}")


def _check_test_classes(folder: Path, classes: tuple[str, ...]) -> None:
    found = class_names(folder)
    if not found:
        raise DataError(
            f"no class folders in {folder}; looked for {folder}/<class>/*.JPEG, and for images with a list of labels"
        )
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(
            f"{folder} has {len(unknown)} class folders that the training images do not have "
            f"({', '.join(unknown[:5])}); both must use the same class names"
        )


def image_files(folder: Path) -> tuple[list[bytes], list[bytes]]:
    """The sorted names of the images in `folder` and its subfolders, relative to it, and those of the other files.

    Files of the system (`is_junk`) are in neither list. Both are empty if the folder does not exist. A link to a folder
    that contains it is not followed.
    """
    images: list[bytes] = []
    others: list[bytes] = []
    waiting: list[tuple[bytes, bytes, frozenset[tuple[int, int]]]] = []
    if folder.is_dir():
        waiting.append((os.fsencode(folder), b"", frozenset()))
    while waiting:
        path, prefix, above = waiting.pop()
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in above:
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                text = os.fsdecode(entry.name)
                if is_junk(text):
                    continue
                if is_image(text):
                    images.append(prefix + entry.name)
                elif entry.is_dir():
                    waiting.append((entry.path, prefix + entry.name + b"/", above | {(status.st_dev, status.st_ino)}))
                else:
                    others.append(prefix + entry.name)
    return sorted(images), sorted(others)
