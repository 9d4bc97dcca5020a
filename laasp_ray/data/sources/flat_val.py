"""A flat validation set, as ImageNet's is distributed: images of all classes in one tar or folder, with a label
list.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from laasp_ray.data.sources.base import ImageSource, check_labels, tell_skipped
from laasp_ray.data.sources.folder import TEST_FOLDERS, class_names, image_files
from laasp_ray.data.sources.imagenet_tar import tar_index
from laasp_ray.data.sources.label_list import LabelList
from laasp_ray.data.sources.tar_index import TarImages
from laasp_ray.errors import DataError

TEST_TARS = ("ILSVRC2012_img_val.tar", "val.tar", "test.tar")
LABEL_LISTS = (
    "val_labels.txt",
    "LOC_val_solution.csv",
    "ILSVRC2012_validation_ground_truth.txt",
    "val_annotations.txt",
)
TINY_FOLDER = "images"
DEVKIT = "ILSVRC2012_devkit_t12/data"


class FlatFolder:
    """The images of one folder, in the order of `files`, labelled by a list."""

    def __init__(self, folder: Path, files: Sequence[bytes], labels: np.ndarray, classes: tuple[str, ...]) -> None:
        self._folder, self._names = folder, np.array(files, dtype=np.bytes_)
        self.labels, self.classes = labels, classes
        check_labels(labels, classes, split="test", where=str(folder))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        return (self._folder / os.fsdecode(self._names[index])).read_bytes()

    def name(self, index: int) -> str:
        return f"{self._folder.name}/{os.fsdecode(self._names[index])}"


def open_flat(root: Path, classes: tuple[str, ...]) -> ImageSource | None:
    """The test images of a flat tar or folder in `root`, sorted by class, then name. None if there is neither.

    `classes` are the training set's. The label list is one of LABEL_LISTS, in `root`, next to the images or in the
    folder of ImageNet's devkit. It has a line `FILE CLASS` for every image, or one line per image in the order of the
    sorted file names. Such a line is the class or, as in the devkit, its number. Numbers need the file
    class_numbers.txt with lines `NUMBER CLASS`. Tiny-ImageNet's val/images is such a folder, and its
    val_annotations.txt such a list. Raises DataError if the list and the images do not fit.
    """
    folder = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if folder is not None and not _is_flat(folder, classes):
        return None
    tar = next((root / name for name in TEST_TARS if (root / name).is_file()), None)
    if tar is not None:
        index = tar_index(tar, nested=False)
        order, labels = _labelled(list(index.names), [root], tar, classes)
        return TarImages([tar], index.only(order), "test", where=str(tar), labels=labels, classes=classes)
    files, others = image_files(folder) if folder is not None else ([], [])
    if folder is None or not files:
        return None
    order, labels = _labelled(files, [root, folder], folder, classes)
    tell_skipped(str(folder), [name for name in map(os.fsdecode, others) if name not in LABEL_LISTS])
    return FlatFolder(folder, [files[place] for place in order], labels, classes)


def _is_flat(folder: Path, classes: tuple[str, ...]) -> bool:
    """Whether `folder` has no class folders. Tiny-ImageNet's validation images are in a subfolder of it."""
    below = class_names(folder)
    return not below or (below == [TINY_FOLDER] and TINY_FOLDER not in classes)


def _labelled(
    files: Sequence[bytes], folders: Sequence[Path], where: Path, classes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The positions of `files` sorted by class, then name, as class folders would have them, and their labels."""
    root = folders[0]
    path = next(
        (
            path
            for folder in (root, root / DEVKIT, *folders)
            for name in LABEL_LISTS
            if (path := folder / name).is_file()
        ),
        None,
    )
    if path is None:
        raise DataError(
            f"{where} holds images of all classes, and no list says which: give {root} one of {', '.join(LABEL_LISTS)} "
            "(lines such as 'ILSVRC2012_val_00000001.JPEG n01751748'), or sort the images into class folders"
        )
    named = LabelList(path, root, classes).of([os.fsdecode(name) for name in files])
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(named) - set(classes))
    if unknown:
        raise DataError(
            f"{path} has {len(unknown)} classes that the training images do not have ({', '.join(unknown[:5])}); both "
            "must use the same class names"
        )
    labels = np.array([numbers[name] for name in named], np.int64)
    order = np.lexsort((np.array(files, dtype=np.bytes_), labels))
    return order, labels[order]
