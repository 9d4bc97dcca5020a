"""ImageNet as distributed: the training tar of class tars, and images read from a tar without unpacking it.

A tar is indexed once. The index has the position of each image and is stored in the cache folder, so workers and later
runs need not read a million headers again. Reading an image is then one read at an offset.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tarfile
import time
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from laasp_ray.data.sources.base import SUFFIXES, Split, check_labels, is_image, is_junk, tell_skipped
from laasp_ray.data.sources.digits import default_cache
from laasp_ray.errors import DataError

logger = logging.getLogger(__name__)

TRAIN_TARS = ("ILSVRC2012_img_train.tar", "train.tar")
_VERSION = 2


@dataclass(frozen=True)
class TarIndex:
    """The images of a tar, sorted by class, then name.

    `names` are bytes (n,); `offsets` and `sizes` are int64 (n,) in bytes of the tar; `labels` are int64 (n,) into
    `classes`. A tar without class tars has one class, with an empty name.
    """

    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


class TarImages:
    """The images of a tar at the positions of an index. Each read opens the file again, so it can be pickled and
    forked.
    """

    def __init__(self, path: Path, index: TarIndex, labels: np.ndarray, classes: tuple[str, ...], split: Split) -> None:
        self._path, self._index = path, index
        self.labels, self.classes = labels, classes
        check_labels(labels, classes, split=split, where=str(path))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        size = int(self._index.sizes[index])
        with self._path.open("rb", buffering=0) as stream:
            stream.seek(int(self._index.offsets[index]))
            content = stream.read(size)
        if len(content) != size:
            raise OSError(f"{self._path} ends within {self.name(index)}")
        return content

    def name(self, index: int) -> str:
        file = os.fsdecode(self._index.names[index])
        within = self._index.classes[self._index.labels[index]]
        return f"{self._path.name}/{within}/{file}" if within else f"{self._path.name}/{file}"


def open_train_tar(root: Path) -> TarImages:
    """Opens `ILSVRC2012_img_train.tar` (or `train.tar`): `<class>.tar` members, each with the images of the class.

    Raises DataError if it does not exist or has another structure.
    """
    path = _wanted(root)
    index = tar_index(path, nested=True)
    return TarImages(path, index, index.labels, index.classes, "train")


def train_classes(root: Path) -> tuple[str, ...]:
    """The sorted names of the class tars in the training tar, from its own headers only. Raises the errors of
    `open_train_tar`.
    """
    path = _wanted(root)
    with path.open("rb", buffering=0) as stream:
        return tuple(sorted(_class_tars(path, stream)))


def train_tar(root: Path) -> Path | None:
    """The training tar in `root`, or None."""
    return next((root / name for name in TRAIN_TARS if (root / name).is_file()), None)


def _wanted(root: Path) -> Path:
    path = train_tar(root)
    if path is None:
        raise DataError(f"no training tar in {root}; looked for {' or '.join(TRAIN_TARS)}")
    return path


def tar_index(path: Path, *, nested: bool) -> TarIndex:
    """The index from the cache, or a new one that is stored there. `nested`: each member is the tar of one class.

    A tar with another size or modification time gets a new index. A cache that cannot be written gives a log line.
    """
    status = path.stat()
    key = f"{_VERSION}/{nested}/{path.absolute()}/{status.st_size}/{status.st_mtime_ns}"
    kept = default_cache() / f"tar-index-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if kept.is_file():
        try:
            with np.load(kept, allow_pickle=False) as arrays:
                classes = tuple(str(name) for name in arrays["classes"])
                return TarIndex(arrays["names"], arrays["offsets"], arrays["sizes"], arrays["labels"], classes)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s cannot be read (%s): %s is indexed anew", kept, error, path)
    started = time.perf_counter()
    logger.info("indexing %s, once", path)
    index = _made(path, nested)
    logger.info("%d images in %s, indexed in %.0f s", len(index.labels), path, time.perf_counter() - started)
    _keep(index, kept)
    return index


def _keep(index: TarIndex, kept: Path) -> None:
    content = io.BytesIO()
    np.savez(
        content,
        names=index.names,
        offsets=index.offsets,
        sizes=index.sizes,
        labels=index.labels,
        classes=np.array(index.classes, dtype=np.str_),
    )
    aside = kept.with_name(f".{kept.name}-{uuid.uuid4().hex}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(content.getvalue())
            aside.replace(kept)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the index cannot be kept (%s): every worker makes its own; set LAASP_RAY_CACHE", error)


def _made(path: Path, nested: bool) -> TarIndex:
    found: list[tuple[str, bytes, int, int]] = []  # class, name, offset, size
    skipped: list[str] = []
    classes, size = {""}, path.stat().st_size
    with path.open("rb", buffering=0) as stream:
        if nested:
            parts = _class_tars(path, stream)
            for name, member in parts.items():
                end = min(member.offset_data + member.size, size)
                found += [(name, *image) for image in _images(path, stream, member.offset_data, end, skipped)]
            classes = set(parts)
        else:
            found += [("", *image) for image in _images(path, stream, 0, size, skipped)]
    tell_skipped(str(path), skipped)
    if not found:
        raise DataError(f"{path} has no images ({', '.join(SUFFIXES)})")
    found.sort()
    label = {name: number for number, name in enumerate(sorted(classes))}
    return TarIndex(
        names=np.array([entry[1] for entry in found], dtype=np.bytes_),
        offsets=np.array([entry[2] for entry in found], np.int64),
        sizes=np.array([entry[3] for entry in found], np.int64),
        labels=np.array([label[entry[0]] for entry in found], np.int64),
        classes=tuple(label),
    )


def _images(path: Path, stream: BinaryIO, start: int, end: int, skipped: list[str]) -> list[tuple[bytes, int, int]]:
    """Name, offset and size of the images of the tar that begins at `start` of `path` and must end before `end`.

    The names of its other members are added to `skipped`. If members have the same name the last one counts, as in
    unpacking.
    """
    images: dict[bytes, tuple[int, int]] = {}
    for member in _members(path, stream, start):
        if member.offset_data + member.size > end:
            raise DataError(f"{path} is cut off or damaged: {member.name} reaches beyond the end of its tar")
        if member.isfile() and is_image(member.name):
            images[os.fsencode(str(PurePosixPath(member.name)))] = member.offset_data, member.size
        else:
            skipped.append(member.name)
    short = {name: name.rpartition(b"/")[2] for name in images}
    if len(set(short.values())) < len(images):  # images in different folders may have the same name
        short = {name: name for name in images}
    return [(short[name], *place) for name, place in images.items()]


def _members(path: Path, stream: BinaryIO, start: int) -> Iterator[tarfile.TarInfo]:
    """The members of the tar that begins at `start`, without folders and files of the system (`is_junk`).

    `offset_data` of a member counts from the beginning of `path`.
    """
    stream.seek(start)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                if not member.isdir() and not any(is_junk(part) for part in parts):
                    yield member
            stream.seek(archive.offset)  # tarfile takes any invalid header as the end, but the end is a block of zeros
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("no header where one must be")
    except tarfile.TarError as error:
        raise DataError(f"{path} cannot be read as a tar (at byte {start}): {error}; fetch it anew") from error


def _class_tars(path: Path, stream: BinaryIO) -> dict[str, tarfile.TarInfo]:
    """The members of the training tar by class."""
    parts: dict[str, tarfile.TarInfo] = {}
    for member in _members(path, stream, 0):
        name = _class_of(path, member)
        if name in parts:
            raise DataError(f"{path} holds two tars of the class {name}: {parts[name].name} and {member.name}")
        parts[name] = member
    return parts


def _class_of(path: Path, member: tarfile.TarInfo) -> str:
    name = PurePosixPath(member.name)
    if name.suffix != ".tar" or not member.isfile():
        raise DataError(
            f"{path} holds {member.name}{'' if member.isfile() else ' (a link)'}, expected one tar for each class, "
            "such as n01440764.tar, with its images"
        )
    return name.stem
