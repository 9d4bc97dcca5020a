"""Images in tars, read without unpacking: an index has each image's position, and a read is one read at an offset.

An index is made once and stored in the cache folder, so workers and later runs need not read a million headers again.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from laasp_ray.data.sources.base import Split, check_labels, is_junk
from laasp_ray.data.sources.digits import default_cache
from laasp_ray.errors import DataError

logger = logging.getLogger(__name__)

_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """The images of one or several tars, in the order of the data set.

    `names` are bytes (n,); `tars` are int64 (n,), the number of the tar that has the image; `offsets` and `sizes` are
    int64 (n,) in bytes of that tar; `labels` are int64 (n,) into `classes`.
    """

    names: np.ndarray
    tars: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def only(self, order: np.ndarray) -> TarIndex:
        """The images at the positions `order`, in that order."""
        arrays = {name: getattr(self, name)[order] for name in _ARRAYS}
        return replace(self, **arrays)


_ARRAYS = tuple(field.name for field in fields(TarIndex) if field.name != "classes")


class TarImages:
    """The images of tars at the positions of an index. Each read opens the file again, so it can be pickled and forked.

    `labels` and `classes` are the index's unless others are given. In names of images each tar is called by its file's
    name, after the `folder`, if one is given.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        index: TarIndex,
        split: Split,
        *,
        where: str,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
        folder: str = "",
    ) -> None:
        self._paths, self._index = tuple(paths), index
        self._shown = [f"{folder}/{path.name}" if folder else path.name for path in paths]
        self.labels = index.labels if labels is None else labels
        self.classes = index.classes if classes is None else classes
        check_labels(self.labels, self.classes, split=split, where=where)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        size, path = int(self._index.sizes[index]), self._paths[self._index.tars[index]]
        with path.open("rb", buffering=0) as stream:
            stream.seek(int(self._index.offsets[index]))
            content = stream.read(size)
        if len(content) != size:
            raise OSError(f"{path} ends within {self.name(index)}")
        return content

    def name(self, index: int) -> str:
        return f"{self._shown[self._index.tars[index]]}/{os.fsdecode(self._index.names[index])}"


def index_of(found: Sequence[tuple[bytes, int, int, int, int]], classes: tuple[str, ...]) -> TarIndex:
    """The index of images given as rows (name, tar, offset, size, label), in their order."""
    columns = [np.array([row[place] for row in found], np.int64) for place in range(1, 5)]
    return TarIndex(
        names=np.array([row[0] for row in found], dtype=np.bytes_),
        tars=columns[0],
        offsets=columns[1],
        sizes=columns[2],
        labels=columns[3],
        classes=classes,
    )


def kept_index(key: str, what: str, make: Callable[[], TarIndex]) -> TarIndex:
    """The index from the cache, or the one that `make` gives, which is then stored there.

    `key` must say all that the index depends on, such as size and modification time of the tar; `what` is for log
    lines. A cache that cannot be written gives a log line.
    """
    kept = default_cache() / f"tar-index-{hashlib.sha256(f'{_VERSION}/{key}'.encode()).hexdigest()[:16]}.npz"
    if kept.is_file():
        try:
            with np.load(kept, allow_pickle=False) as arrays:
                classes = tuple(str(name) for name in arrays["classes"])
                return TarIndex(classes=classes, **{name: arrays[name] for name in _ARRAYS})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s cannot be read (%s): %s is indexed anew", kept, error, what)
    started = time.perf_counter()
    logger.info("indexing %s, once", what)
    index = make()
    logger.info("%d images in %s, indexed in %.0f s", len(index.labels), what, time.perf_counter() - started)
    _keep(index, kept)
    return index


def _keep(index: TarIndex, kept: Path) -> None:
    content = io.BytesIO()
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    np.savez(content, classes=np.array(index.classes, dtype=np.str_), **arrays)
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


def members(path: Path, stream: BinaryIO, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """The members of the tar that begins at `start` of `path` and must end before `end`, without folders and files of
    the system (`is_junk`).

    `offset_data` of a member counts from the beginning of `path`. Raises DataError if it is no tar or is cut off.
    """
    stream.seek(start)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it keeps all headers otherwise, a million of a tar
                parts = PurePosixPath(member.name).parts
                if member.isdir() or any(is_junk(part) for part in parts):
                    continue
                if member.offset_data + member.size > end:
                    raise DataError(f"{path} is cut off or damaged: {member.name} reaches beyond the end of its tar")
                yield member
            stream.seek(archive.offset)  # tarfile takes any invalid header as the end, but the end is a block of zeros
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("no header where one must be")
    except tarfile.TarError as error:
        raise DataError(f"{path} cannot be read as a tar (at byte {start}): {error}; fetch it anew") from error
