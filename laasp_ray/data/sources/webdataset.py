"""WebDataset shards: tars of pairs KEY.jpg and KEY.cls, listed by `index.json`, read at offsets without unpacking.

The images are numbered in the order of their keys, whichever shard has them. So the order of training and every image's
augmentation do not depend on how the samples were cut into shards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from laasp_ray.data.sources.base import SUFFIXES, Split, tell_skipped
from laasp_ray.data.sources.folder import TEST_FOLDERS, class_names
from laasp_ray.data.sources.shard_list import (
    INDEX,
    SHARD_SUFFIX,
    ShardList,
    check_files,
    read_shard_list,
    remedy,
    shard_files,
)
from laasp_ray.data.sources.tar_index import TarImages, TarIndex, index_of, kept_index, members
from laasp_ray.errors import DataError

LABEL_SUFFIX = ".cls"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
_MOST_CLASSES = 1_000_000
_LONGEST_LABEL = 20

Row = tuple[bytes, int, int, int, int]
"""Name, number of the shard, offset, size, label."""


class ShardImages(TarImages):
    """The samples of a split's shards. `shard_list_digest` tells one list of shards from another."""

    def __init__(self, folder: Path, listed: ShardList, index: TarIndex, split: Split) -> None:
        paths = [folder / shard.name for shard in listed.shards]
        super().__init__(paths, index, split, where=str(folder), folder=folder.name)
        self.shard_list_digest = listed.digest


def open_shards(root: Path, split: Split) -> ShardImages:
    """Opens the shards in `<root>/train`, or for the test split in `<root>/val` or `<root>/test`.

    Raises DataError if `index.json` is missing or damaged, if a shard is missing or has another size than it says, and
    where a sample is incomplete or its label is no class.
    """
    folder = shards_folder(root, split)
    if folder is None:
        looked = " or ".join(f"{path}/{INDEX}" for path in split_folders(root, split))
        raise DataError(f"no {split} shards in {root}; looked for {looked} and tars beside it")
    listed = read_shard_list(folder)
    check_files(folder, listed.shards)
    unlisted = {path.name for path in shard_files(folder)} - {shard.name for shard in listed.shards}
    if unlisted:
        raise DataError(
            f"{folder} has {len(unlisted)} shards that {INDEX} does not list ({', '.join(sorted(unlisted)[:5])}): move "
            f"them away, or remove {INDEX} and {remedy(folder)}"
        )
    states = [(folder / shard.name).stat() for shard in listed.shards]
    times = hashlib.sha256(",".join(str(status.st_mtime_ns) for status in states).encode()).hexdigest()
    key = f"shards/{folder.absolute()}/{listed.digest}/{times}"
    index = kept_index(key, f"{len(listed.shards)} shards in {folder}", lambda: _made(folder, listed))
    return ShardImages(folder, listed, index, split)


def split_folders(root: Path, split: Split) -> list[Path]:
    """The folders that may have the shards of a split, in the order in which they are looked for."""
    return [root / name for name in (("train",) if split == "train" else TEST_FOLDERS)]


def shards_folder(root: Path, split: Split) -> Path | None:
    """The folder with the shards of a split, or None. A list of shards is enough, and so are tars without one, where
    there are no class folders.
    """
    for folder in split_folders(root, split):
        if (folder / INDEX).is_file():
            return folder
        if folder.is_dir() and _tars(folder) and not class_names(folder):
            return folder
    return None


def read_samples(path: Path, number: int, classes: tuple[str, ...], skipped: list[str]) -> list[Row]:
    """The samples of the shard at `path`, which has this `number`. `classes` may be empty: then any label fits.

    Names of other members are added to `skipped`. Raises DataError, naming the key, for an image without a label or the
    other way round, for two images of one key, and for a label that is no class.
    """
    images: dict[bytes, tuple[bytes, int, int]] = {}
    labels: dict[bytes, int] = {}
    with path.open("rb", buffering=0) as stream:
        _check_uncompressed(path, stream)
        for member in members(path, stream, 0, path.stat().st_size):
            name = os.fsencode(member.name.removeprefix("./"))
            key, suffix = _parts(name)
            if suffix == LABEL_SUFFIX and member.isfile():
                _check_new(key in labels, path, key, "labels")
                stream.seek(member.offset_data)
                labels[key] = _label(stream.read(min(member.size, _LONGEST_LABEL + 1)), path, key, classes)
            elif suffix in SUFFIXES and member.isfile():
                _check_new(key in images, path, key, "images")
                images[key] = name, member.offset_data, member.size
            else:
                skipped.append(member.name)
    _check_pairs(path, images.keys() - labels.keys(), f"no label (KEY{LABEL_SUFFIX})")
    _check_pairs(path, labels.keys() - images.keys(), "no image (KEY.jpg)")
    return [(name, number, offset, size, labels[key]) for key, (name, offset, size) in images.items()]


def _made(folder: Path, listed: ShardList) -> TarIndex:
    rows: list[Row] = []
    skipped: list[str] = []
    for number, shard in enumerate(listed.shards):
        found = read_samples(folder / shard.name, number, listed.classes, skipped)
        if len(found) != shard.samples:
            raise DataError(
                f"{folder / shard.name} has {len(found)} samples, {INDEX} says {shard.samples}: copy it anew, or "
                f"remove {INDEX} and {remedy(folder)}"
            )
        rows += found
    tell_skipped(str(folder), skipped)
    if not rows:
        raise DataError(f"the shards in {folder} have no samples (pairs KEY.jpg and KEY{LABEL_SUFFIX})")
    rows.sort()
    classes = listed.classes or tuple(map(str, range(max(row[4] for row in rows) + 1)))
    return index_of(rows, classes)


def _tars(folder: Path) -> bool:
    """Whether there are tars, compressed ones included: an error then says that these cannot be read."""
    return any(folder.glob(f"*{SHARD_SUFFIX}")) or any(folder.glob(f"*{SHARD_SUFFIX}.*"))


def _parts(name: bytes) -> tuple[bytes, str]:
    """The key of a member's name, up to the first dot of its last part, and the suffix behind it in small letters."""
    folder, slash, file = name.rpartition(b"/")
    stem, dot, suffix = file.partition(b".")
    return folder + slash + stem, os.fsdecode(dot + suffix).lower()


def _check_uncompressed(path: Path, stream: BinaryIO) -> None:
    start = stream.read(6)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path} is compressed ({name}), and images are read at their offsets: uncompress it (images gain "
                f"nothing from it), then remove {INDEX} and {remedy(path.parent)}"
            )


def _check_new(is_known: bool, path: Path, key: bytes, what: str) -> None:
    if is_known:
        raise DataError(f"{path} has two {what} of the key {os.fsdecode(key)}: every sample needs a key of its own")


def _check_pairs(path: Path, lacking: Collection[bytes], what: str) -> None:
    if lacking:
        raise DataError(
            f"{path}: {len(lacking)} of its samples have {what}, the first {os.fsdecode(min(lacking))}: write every "
            f"sample as a pair, KEY.jpg and KEY{LABEL_SUFFIX}, in one shard"
        )


def _label(content: bytes, path: Path, key: bytes, classes: tuple[str, ...]) -> int:
    text, most = content.strip(), len(classes) or _MOST_CLASSES
    if not text.isdigit() or len(content) > _LONGEST_LABEL:
        raise DataError(
            f"{path}: {os.fsdecode(key)}{LABEL_SUFFIX} holds {content[:_LONGEST_LABEL]!r}, must be the number of a "
            "class in digits, from 0"
        )
    if int(text) >= most:
        raise DataError(
            f"{path}: {os.fsdecode(key)} has the label {int(text)}, of {most} classes (0 to {most - 1}): write the "
            "shards anew, with the numbers of the classes"
        )
    return int(text)
