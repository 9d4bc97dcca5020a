"""CIFAR-10 and CIFAR-100 as distributed: folders of pickled arrays (Krizhevsky 2009)."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from laasp_ray.data.sources.base import Split, check_labels
from laasp_ray.errors import DataError

BATCHES_FOLDER = "cifar-10-batches-py"
FOLDER_100 = "cifar-100-python"
SIDE = 32
_ADMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class _Archive:
    """What one of the two archives has in its folder. `labels`: data.label -> the key of the labels in its files, the
    default first. `names`: the same -> the key of the classes' names in the file `meta`.
    """

    data_set: str
    folder: str
    files: Mapping[Split, tuple[str, ...]]
    meta: str
    labels: Mapping[str, bytes]
    names: Mapping[str, bytes]


_ARCHIVES = (
    _Archive(
        data_set="CIFAR-10",
        folder=BATCHES_FOLDER,
        files={"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        meta="batches.meta",
        labels={"label": b"labels"},
        names={"label": b"label_names"},
    ),
    _Archive(
        data_set="CIFAR-100",
        folder=FOLDER_100,
        files={"train": ("train",), "test": ("test",)},
        meta="meta",
        labels={"fine_label": b"fine_labels", "coarse_label": b"coarse_labels"},
        names={"fine_label": b"fine_label_names", "coarse_label": b"coarse_label_names"},
    ),
)


class CifarBatchesSource:
    """CIFAR-10's images in `root` or in `root/cifar-10-batches-py`, or CIFAR-100's, in `cifar-100-python`.

    `label` chooses CIFAR-100's labels: `fine_label` (100 classes, the default) or `coarse_label` (20). `read` returns a
    lossless bitmap file made in memory.
    """

    def __init__(self, root: Path, split: Split, label: str | None = None) -> None:
        found = _found(root)
        if found is None:
            raise DataError(
                f"no CIFAR-10 batches in {root}; looked for data_batch_1 and {BATCHES_FOLDER}/data_batch_1, and for "
                f"CIFAR-100's {FOLDER_100}/train with meta beside it"
            )
        archive, folder = found
        chosen = next(iter(archive.labels)) if label is None else label
        if chosen not in archive.labels:
            raise DataError(
                f"data.label is {label!r}, and {archive.data_set} in {folder} has {' and '.join(archive.labels)}"
            )
        data_set = archive.data_set
        names = _load(folder / archive.meta, data_set).get(archive.names[chosen])
        if not isinstance(names, list):
            raise DataError(f"{folder / archive.meta} has no {archive.names[chosen].decode()}; is it {data_set}'s own?")
        self.classes = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
        self._files = archive.files[split]
        batches = [_batch(folder / name, archive.labels[chosen], data_set) for name in self._files]
        self._pixels = np.concatenate([pixels for pixels, _ in batches])
        self.labels = np.concatenate([labels for _, labels in batches])
        self._first_rows = np.cumsum([0] + [len(labels) for _, labels in batches])
        check_labels(self.labels, self.classes, split=split, where=str(folder))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        return bitmap(self._pixels[index].reshape(3, SIDE, SIDE))

    def name(self, index: int) -> str:
        file = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return f"{self._files[file]}#{index - self._first_rows[file]}"


def batches_folder(root: Path) -> Path | None:
    """The folder of CIFAR-10's batches or CIFAR-100's files: `root`, or the folder of the original archive in it. None
    if neither has them.
    """
    found = _found(root)
    return None if found is None else found[1]


def _found(root: Path) -> tuple[_Archive, Path] | None:
    for archive in _ARCHIVES:
        # CIFAR-100's file of images is called `train`, as many a folder is.
        needed = (archive.files["train"][0], *([archive.meta] if archive.folder == FOLDER_100 else []))
        for folder in (root, root / archive.folder):
            if all((folder / name).is_file() for name in needed):
                return archive, folder
    return None


def bitmap(pixels: np.ndarray) -> bytes:
    """A BMP file of `pixels` (3, H, W) uint8 RGB: 24 bits per pixel, rows from bottom to top, padded to 4 bytes."""
    _, height, width = pixels.shape
    rows = np.zeros((height, (3 * width + 3) // 4 * 4), np.uint8)
    rows[:, : 3 * width] = pixels[::-1, ::-1].transpose(1, 2, 0).reshape(height, 3 * width)
    file_header = struct.pack("<2sIHHI", b"BM", 54 + rows.size, 0, 0, 54)
    image_header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, rows.size, 2835, 2835, 0, 0)
    return file_header + image_header + rows.tobytes()


def _batch(file: Path, key: bytes, data_set: str) -> tuple[np.ndarray, np.ndarray]:
    content = _load(file, data_set)
    pixels, labels = content.get(b"data"), content.get(key)
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.ndim != 2
        or pixels.shape[1] != 3 * SIDE * SIDE
    ):
        raise DataError(f"{file} has no uint8 array 'data' of {3 * SIDE * SIDE} columns; is it {data_set}'s own?")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        raise DataError(f"{file} does not have one integer in {key.decode()!r} for each of its {len(pixels)} images")
    return pixels, np.array(labels, np.int64)


def _load(file: Path, data_set: str) -> dict[bytes, Any]:
    try:
        with file.open("rb") as stream:
            content = _ArraysOnly(stream).load()
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing; {data_set}'s archive has it") from error
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, ImportError, IndexError) as error:
        raise DataError(f"{file} is not one of {data_set}'s batches: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, expected a dictionary; is it {data_set}'s own?")
    return content


class _ArraysOnly(pickle.Unpickler):
    """Loads only plain values and numpy arrays. A pickle can call any function, and a download is not trusted."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no array needs; it is not read")
        return super().find_class(module, name)
