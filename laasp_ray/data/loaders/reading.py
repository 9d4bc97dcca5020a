"""Reads encoded images ahead in threads and leaves out unreadable ones. Both loaders use it."""

from __future__ import annotations

import errno
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from laasp_ray.data.loaders.decoding import bitmap_of, centre_size, checked_size
from laasp_ray.data.sources.base import ImageSource
from laasp_ray.errors import DataError

logger = logging.getLogger(__name__)

BATCHES_READ_AHEAD = 2
RETRY_PAUSES_S = (0.1, 0.5, 2.0)
"""The seconds before each further attempt to read an image."""

OTHERS = 5
"""The number of other images that are tried before an image is blamed for a failed read. Most of them must be
readable.
"""

_PLACES = 64
_NEVER_AN_IMAGES_FAULT = frozenset(
    getattr(errno, name)
    for name in (
        *("EMFILE", "ENFILE", "ENOMEM", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN"),
        *("ENETUNREACH", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED"),
    )
    if hasattr(errno, name)
)


@dataclass(frozen=True)
class Batch:
    """Decoded images, NCHW on the loader's device: float32 and normalised, or uint8. `labels` are int64 (n,).

    `indices` (int64, (n,)) are the images' numbers in the source. Unreadable images are left out. A data set of the
    user's own gives inputs as `images` and targets of any structure as `labels`.
    """

    images: Any
    labels: Any
    indices: np.ndarray


@dataclass(frozen=True)
class EncodedBatch:
    """Files as read: `indices` (n,), their bytes, and `sizes` (n, 2), heights and widths in pixels."""

    indices: np.ndarray
    encoded: list[bytes]
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.encoded)

    def without(self, indices: Collection[int]) -> EncodedBatch:
        """The batch without the images `indices`."""
        keep = [position for position, index in enumerate(self.indices) if int(index) not in indices]
        return EncodedBatch(self.indices[keep], [self.encoded[position] for position in keep], self.sizes[keep])

    def only(self, position: int) -> EncodedBatch:
        """A batch of only the image at `position`."""
        one = slice(position, position + 1)
        return EncodedBatch(self.indices[one], self.encoded[one], self.sizes[one])


class LeftOut(Protocol):
    """Which images of a source are left out, as a feed needs it."""

    def readable(self, indices: np.ndarray) -> np.ndarray:
        """The `indices` that are not left out, in their order."""
        ...

    def leave_out(self, index: int, reason: str) -> None:
        """Leaves out image `index` from now on."""
        ...


class UnreadableImages:
    """The images of `source` that are left out: those `excluded` by name from the start, and those found later.

    Each image found is logged with its reason, and its name is passed to `on_unreadable`. Raises DataError for more
    than `bound` images in all.
    """

    def __init__(
        self, source: ImageSource, bound: int, excluded: Collection[str], on_unreadable: Callable[[str], None] | None
    ) -> None:
        self._source = source
        self._bound = bound
        self._names = dict.fromkeys(excluded)
        self._on_unreadable = on_unreadable
        self._check_bound()

    def readable(self, indices: np.ndarray) -> np.ndarray:
        """The `indices` that are not left out, in their order."""
        if not self._names:
            return indices
        return indices[[self._source.name(int(index)) not in self._names for index in indices]]

    def leave_out(self, index: int, reason: str) -> None:
        """Leaves out image `index` from now on."""
        name = self._source.name(index)
        if name in self._names:
            return
        self._names[name] = None
        logger.warning("unreadable image %s is left out from now on: %s", name, reason)
        if self._on_unreadable is not None:
            self._on_unreadable(name)
        self._check_bound()

    def _check_bound(self) -> None:
        if len(self._names) > self._bound:
            raise DataError(
                f"{len(self._names)} images are unreadable, data.max_unreadable allows {self._bound}: "
                f"{_some(list(self._names))}; repair them, or raise data.max_unreadable to go on without them"
            )


class ImageFeed:
    """Reads the files of batches ahead of their use, in `threads` threads. It lives for many epochs."""

    def __init__(
        self,
        source: ImageSource,
        unreadable: LeftOut,
        *,
        threads: int,
        max_batch: int,
        longest: int | None = None,
        takes: Callable[[bytes], bool] = lambda data: True,
    ) -> None:
        """An image whose longer side is more than `longest` times its shorter side is cut to its centre. `takes` says
        whether the decoder knows a file's format. Images that are cut, or that the decoder does not know, are decoded
        here and passed on as bitmaps.
        """
        self._longest, self._takes = longest, takes
        self._as_bitmaps: set[int] = set()
        self._source = source
        self._unreadable = unreadable
        self._threads = threads
        self._max_batch = max_batch
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="image-reader")
        # Height and width of every image seen so far (0: not yet), so headers are parsed only in the first epoch.
        self._sizes = np.zeros((len(source), 2), np.int32)

    def read(self, batches: Sequence[np.ndarray]) -> Iterator[EncodedBatch]:
        """The batches in order, without their unreadable images. A batch without any readable image is skipped.

        A short failure of the storage does not mean a broken image. So a failed read is repeated, and the image is left
        out only if other images can be read. Raises DataError if the storage fails, and if too many images are
        unreadable; raises ValueError for a batch larger than `max_batch`.
        """
        ahead: deque[list[Future[_Chunk]]] = deque()
        remaining = iter(batches)
        while True:
            for batch in itertools.islice(remaining, BATCHES_READ_AHEAD + 1 - len(ahead)):
                ahead.append(self._start(np.asarray(batch, np.int64)))
            if not ahead:
                return
            encoded = self._finish(ahead.popleft())
            if len(encoded):
                yield encoded

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, batch: np.ndarray) -> list[Future[_Chunk]]:
        if len(batch) > self._max_batch:
            raise ValueError(f"a batch of {len(batch)} images for a loader made with max_batch {self._max_batch}")
        readable = self._unreadable.readable(batch)
        parts = np.array_split(readable, min(self._threads, len(readable))) if len(readable) else []
        return [self._pool.submit(self._read_chunk, part) for part in parts]

    def _read_chunk(self, indices: np.ndarray) -> _Chunk:
        chunk = self._try([int(index) for index in indices])
        for pause in RETRY_PAUSES_S:
            if not chunk.unread:
                break
            index, error = next(iter(chunk.unread.items()))
            logger.warning(
                "%d of %d images could not be read (%s: %s); trying again",
                len(chunk.unread),
                len(chunk.wanted),
                self._source.name(index),
                error,
            )
            time.sleep(pause)
            chunk = chunk.after(self._try(list(chunk.unread)))
        return chunk

    def _try(self, indices: list[int]) -> _Chunk:
        chunk = _Chunk(indices)
        for index in indices:
            try:
                data = self._source.read(index)
            except OSError as error:
                chunk.unread[index] = error
                continue
            try:
                chunk.files[index] = self._prepared(index, data)
            except OSError as error:
                chunk.broken[index] = error
        return chunk

    def _prepared(self, index: int, data: bytes) -> bytes:
        """The file in the form that the decoder gets. Raises OSError if it is broken."""
        if self._sizes[index, 0] == 0:
            size = checked_size(data)
            kept = size if self._longest is None else centre_size(size, self._longest)
            if kept != size or not self._takes(data):
                self._as_bitmaps.add(index)
            self._sizes[index] = kept
        if index not in self._as_bitmaps:
            return data
        height, width = self._sizes[index]
        return bitmap_of(data, (int(height), int(width)))

    def decode_here(self, batch: EncodedBatch, indices: Collection[int]) -> EncodedBatch:
        """`batch` with bitmaps for the images `indices`, which are passed as bitmaps from now on."""
        self._as_bitmaps.update(indices)
        encoded = [
            bitmap_of(data, (int(size[0]), int(size[1]))) if int(index) in indices else data
            for index, data, size in zip(batch.indices, batch.encoded, batch.sizes, strict=True)
        ]
        return EncodedBatch(batch.indices, encoded, batch.sizes)

    def decodes_here(self, index: int) -> bool:
        """Whether the image is already passed as a bitmap."""
        return index in self._as_bitmaps

    def _finish(self, futures: list[Future[_Chunk]]) -> EncodedBatch:
        chunk = _Chunk.of([future.result() for future in futures])
        if chunk.failures:
            chunk = self._blamed(chunk)
        for index, error in chunk.failures.items():
            self._unreadable.leave_out(index, str(error))
        found = np.array([index for index in chunk.wanted if index in chunk.files], np.int64)
        # Other threads may have found images unreadable while these files were read.
        indices = self._unreadable.readable(found)
        encoded = [chunk.files[int(index)] for index in indices]
        return EncodedBatch(indices, encoded, self._sizes[indices].astype(np.int64))

    def _blamed(self, chunk: _Chunk) -> _Chunk:
        """`chunk` with only the failures that are the images' own fault: other images could be read before and
        after.
        """
        self._check_storage(chunk)
        chunk = chunk.after(self._try(list(chunk.failures)))
        if chunk.failures:
            self._check_storage(chunk)
        return chunk

    def _check_storage(self, chunk: _Chunk) -> None:
        machine = next((index for index, error in chunk.unread.items() if error.errno in _NEVER_AN_IMAGES_FAULT), None)
        others = self._others(chunk.failures)
        failed = sum(not self._gives(index) for index in others)
        alive = 2 * failed < len(others) or not (others or chunk.unread)
        if machine is None and alive:
            return
        index = machine if machine is not None else next(iter(chunk.failures))
        tried = f", and {failed} of {len(others)} others that were tried then" if failed else ""
        raise DataError(
            f"the storage cannot be read: {len(chunk.failures)} of {len(chunk.wanted)} images failed, the first "
            f"{self._source.name(index)}: {chunk.failures[index]}{tried}; no image is left out for that: see to the "
            "storage, then start the run again"
        )

    def _others(self, failures: Mapping[int, OSError]) -> list[int]:
        """A few images that have not failed so far, spread over the source."""
        count, first = len(self._source), next(iter(failures))
        places = (first + np.arange(1, min(count, _PLACES)) * max(1, count // _PLACES)) % count
        candidates = self._unreadable.readable(places[[int(index) not in failures for index in places]])
        return candidates[:: max(1, len(candidates) // OTHERS)][:OTHERS].tolist()

    def _gives(self, index: int) -> bool:
        """Whether the storage returns any bytes for an image, even if they are broken."""
        try:
            return len(self._source.read(index)) > 0
        except OSError:
            return False


@dataclass(frozen=True)
class _Chunk:
    """The images `wanted`. Each is in one of `files`, `unread` (the read failed) or `broken` (read, but not an
    image).
    """

    wanted: list[int]
    files: dict[int, bytes] = field(default_factory=dict)
    unread: dict[int, OSError] = field(default_factory=dict)
    broken: dict[int, OSError] = field(default_factory=dict)

    @staticmethod
    def of(parts: Sequence[_Chunk]) -> _Chunk:
        whole = _Chunk([index for part in parts for index in part.wanted])
        for part in parts:
            whole.files.update(part.files)
            whole.unread.update(part.unread)
            whole.broken.update(part.broken)
        return whole

    @property
    def failures(self) -> dict[int, OSError]:
        return self.unread | self.broken

    def after(self, again: _Chunk) -> _Chunk:
        """The result after some of the images were tried `again`."""
        unread = {index: error for index, error in self.unread.items() if index not in again.wanted}
        broken = {index: error for index, error in self.broken.items() if index not in again.wanted}
        return _Chunk(self.wanted, self.files | again.files, unread | again.unread, broken | again.broken)


def _some(names: list[str], shown: int = 50) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
