"""ImageNet as distributed: the training tar of class tars."""

from __future__ import annotations

import os
import sys
import tarfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from laasp_ray.data.sources.base import SUFFIXES, is_image, tell_skipped
from laasp_ray.data.sources.tar_index import TarImages, TarIndex, index_of, kept_index, members
from laasp_ray.errors import DataError

TRAIN_TARS = ("ILSVRC2012_img_train.tar", "train.tar")


def open_train_tar(root: Path) -> TarImages:
    """Opens `ILSVRC2012_img_train.tar` (or `train.tar`): `<class>.tar` members, each with the images of the class.

    Raises DataError if it does not exist or has another structure.
    """
    path = _wanted(root)
    index = tar_index(path, nested=True)
    return TarImages([path], index, "train", where=str(path))


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
    """The images of a tar, sorted by class, then name. `nested`: each member is the tar of one class.

    It comes from the cache, or is made and stored there. A tar with another size or modification time gets a new index.
    A tar without class tars has one class, with an empty name.
    """
    status = path.stat()
    key = f"{nested}/{path.absolute()}/{status.st_size}/{status.st_mtime_ns}"
    return kept_index(key, str(path), lambda: _made(path, nested))


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
    within = {name: os.fsencode(f"{name}/") if name else b"" for name in label}
    rows = [(within[name] + file, 0, offset, size, label[name]) for name, file, offset, size in found]
    return index_of(rows, tuple(label))


def _images(path: Path, stream: BinaryIO, start: int, end: int, skipped: list[str]) -> list[tuple[bytes, int, int]]:
    """Name, offset and size of the images of the tar that begins at `start` of `path` and must end before `end`.

    The names of its other members are added to `skipped`. If members have the same name the last one counts, as in
    unpacking.
    """
    images: dict[bytes, tuple[int, int]] = {}
    for member in members(path, stream, start, end):
        if member.isfile() and is_image(member.name):
            images[os.fsencode(str(PurePosixPath(member.name)))] = member.offset_data, member.size
        else:
            skipped.append(member.name)
    short = {name: name.rpartition(b"/")[2] for name in images}
    if len(set(short.values())) < len(images):  # images in different folders may have the same name
        short = {name: name for name in images}
    return [(short[name], *place) for name, place in images.items()]


def _class_tars(path: Path, stream: BinaryIO) -> dict[str, tarfile.TarInfo]:
    """The members of the training tar by class."""
    parts: dict[str, tarfile.TarInfo] = {}
    for member in members(path, stream, 0, sys.maxsize):  # of a tar that is cut off the classes are known, too
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
