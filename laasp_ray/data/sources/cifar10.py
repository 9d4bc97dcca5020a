"""CIFAR-10 as distributed: the folder `cifar-10-batches-py` of pickled arrays (Krizhevsky 2009)."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from laasp_ray.data.sources.base import Split, check_labels
from laasp_ray.errors import DataError

BATCHES_FOLDER = "cifar-10-batches-py"
SIDE = 32
_FILES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_ADMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class CifarBatchesSource:
    """CIFAR-10's images in `root` or in `root/cifar-10-batches-py`. `read` returns a lossless bitmap file made in
    memory.
    """

    def __init__(self, root: Path, split: Split) -> None:
        folder = batches_folder(root)
        if folder is None:
            raise DataError(f"no CIFAR-10 batches in {root}; looked for data_batch_1 and {BATCHES_FOLDER}/data_batch_1")
        names = _load(folder / "batches.meta").get(b"label_names")
        if not isinstance(names, list):
            raise DataError(f"{folder / 'batches.meta'} has no label_names; is it CIFAR-10's own?")
        self.classes = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
        batches = [_batch(folder / name) for name in _FILES[split]]
        self._pixels = np.concatenate([pixels for pixels, _ in batches])
        self.labels = np.concatenate([labels for _, labels in batches])
        self._files = _FILES[split]
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
    """The folder of CIFAR-10's batches: `root`, or the folder of the original archive in it. None if neither
    has them.
    """
    return next((folder for folder in (root, root / BATCHES_FOLDER) if (folder / "data_batch_1").is_file()), None)


def bitmap(pixels: np.ndarray) -> bytes:
    """A BMP file of `pixels` (3, H, W) uint8 RGB: 24 bits per pixel, rows from bottom to top, padded to 4 bytes."""
    _, height, width = pixels.shape
    rows = np.zeros((height, (3 * width + 3) // 4 * 4), np.uint8)
    rows[:, : 3 * width] = pixels[::-1, ::-1].transpose(1, 2, 0).reshape(height, 3 * width)
    file_header = struct.pack("<2sIHHI", b"BM", 54 + rows.size, 0, 0, 54)
    image_header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, rows.size, 2835, 2835, 0, 0)
    return file_header + image_header + rows.tobytes()


def _batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    content = _load(file)
    pixels, labels = content.get(b"data"), content.get(b"labels")
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.ndim != 2
        or pixels.shape[1] != 3 * SIDE * SIDE
    ):
        raise DataError(f"{file} has no uint8 array 'data' of {3 * SIDE * SIDE} columns; is it CIFAR-10's own?")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        raise DataError(f"{file} does not have one integer in 'labels' for each of its {len(pixels)} images")
    return pixels, np.array(labels, np.int64)


def _load(file: Path) -> dict[bytes, Any]:
    try:
        with file.open("rb") as stream:
            content = _ArraysOnly(stream).load()
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing; CIFAR-10's archive has it") from error
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, ImportError, IndexError) as error:
        raise DataError(f"{file} is not one of CIFAR-10's batches: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, expected a dictionary; is it CIFAR-10's own?")
    return content


class _ArraysOnly(pickle.Unpickler):
    """Loads only plain values and numpy arrays. A pickle can call any function, and a download is not trusted."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no array needs; it is not read")
        return super().find_class(module, name)
