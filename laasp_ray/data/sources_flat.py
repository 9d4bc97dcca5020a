"""A flat validation set, as ImageNet's is distributed: images of all classes in one tar or folder, and a label list."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from laasp_ray.data.source import ImageSource, check_labels
from laasp_ray.data.sources_folder import TEST_FOLDERS, class_names, image_files
from laasp_ray.data.sources_tar import TarImages, tar_index
from laasp_ray.errors import DataError

TEST_TARS = ("ILSVRC2012_img_val.tar", "val.tar", "test.tar")
LABEL_LISTS = ("val_labels.txt", "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt")
CLASS_NUMBERS = "class_numbers.txt"
DEVKIT = "ILSVRC2012_devkit_t12/data"
_SEPARATORS = re.compile(r"[\s,]+")


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
    """The test images of a flat tar or folder in `root`, sorted by class, then name; None if there is neither.

    `classes` are the training set's. The label list is one of LABEL_LISTS, in `root` or in the folder of ImageNet's
    devkit there: a line for every image, `FILE CLASS`, or lines in the order of the sorted file names, with the class
    or its number alone, as the devkit has it; numbers need the file CLASS_NUMBERS with lines `NUMBER CLASS`. Raises
    DataError where list and images do not fit.
    """
    folder = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if folder is not None and class_names(folder):
        return None
    tar = next((root / name for name in TEST_TARS if (root / name).is_file()), None)
    if tar is not None:
        index = tar_index(tar, nested=False)
        order, labels = _labelled(list(index.names), root, tar, classes)
        chosen = replace(
            index,
            names=index.names[order],
            offsets=index.offsets[order],
            sizes=index.sizes[order],
            labels=index.labels[order],
        )
        return TarImages(tar, chosen, labels, classes, "test")
    files = image_files(folder) if folder is not None else []
    if folder is None or not files:
        return None
    order, labels = _labelled(files, root, folder, classes)
    return FlatFolder(folder, [files[place] for place in order], labels, classes)


def _labelled(
    files: Sequence[bytes], root: Path, where: Path, classes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The places of `files` in the order of class, then name, as class folders would have it; and their labels."""
    places = [root / name for name in LABEL_LISTS] + [root / DEVKIT / name for name in LABEL_LISTS]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError(
            f"{where} holds images of all classes, and no list says which: give {root} one of {', '.join(LABEL_LISTS)} "
            "(lines such as 'ILSVRC2012_val_00000001.JPEG n01751748'), or sort the images into class folders"
        )
    stems = [Path(os.fsdecode(name)).stem for name in files]
    named = _read_list(path, root, stems)
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


def _read_list(path: Path, root: Path, stems: Sequence[str]) -> list[str]:
    """The class of each image, `stems` being their names without suffix."""
    lines = [_SEPARATORS.split(line.strip()) for line in path.read_text().splitlines() if line.strip()]
    if lines and lines[0][0] == "ImageId":
        del lines[0]
    if all(len(words) == 1 for words in lines):
        if len(lines) != len(stems):
            raise DataError(f"{path} has {len(lines)} lines for {len(stems)} images: it must have one for each")
        in_order = dict(zip(sorted(stems), (words[0] for words in lines), strict=True))
        return _classes_of_numbers(path, root, [in_order[stem] for stem in stems])
    short = next((number for number, words in enumerate(lines) if len(words) < 2), None)
    if short is not None:
        raise DataError(f"{path} has lines of one word and of more, such as {lines[short][0]!r}: name the file in each")
    by_name = {Path(words[0]).stem: words[1] for words in lines}
    missing = [stem for stem in stems if stem not in by_name]
    if missing:
        raise DataError(f"{path} lacks {len(missing)} of {len(stems)} images ({', '.join(missing[:5])})")
    return _classes_of_numbers(path, root, [by_name[stem] for stem in stems])


def _classes_of_numbers(path: Path, root: Path, named: list[str]) -> list[str]:
    """Class numbers turned into names; names as they are."""
    if not all(name.isdecimal() for name in named):
        return named
    map_file = next((place for place in (path.with_name(CLASS_NUMBERS), root / CLASS_NUMBERS) if place.is_file()), None)
    if map_file is None:
        raise DataError(
            f"{path} gives classes by number, and the order of the numbers is not that of the names: put a file "
            f"{CLASS_NUMBERS} beside it, lines such as '1 n02119789', from the devkit's meta.mat"
        )
    pairs = [_SEPARATORS.split(line.strip())[:2] for line in map_file.read_text().splitlines() if line.strip()]
    wrong = next((pair for pair in pairs if len(pair) < 2 or not pair[0].isdecimal()), None)
    if wrong is not None:
        raise DataError(f"{map_file} has the line {' '.join(wrong)!r}, expected 'NUMBER CLASS', such as '1 n02119789'")
    names = {int(number): name for number, name in pairs}
    unknown = sorted({int(number) for number in named} - set(names))
    if unknown:
        raise DataError(f"{map_file} lacks {len(unknown)} of the class numbers in {path} ({unknown[:5]})")
    return [names[int(number)] for number in named]
