"""Encoded images, read ahead in threads, with the unreadable ones left out: what both loaders start from."""

from __future__ import annotations

import errno
import io
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from laasp_ray.config import DataConfig
from laasp_ray.data.sources.base import ImageSource
from laasp_ray.errors import DataError

logger = logging.getLogger(__name__)

BATCHES_READ_AHEAD = 2
RETRY_PAUSES_S = (0.1, 0.5, 2.0)
"""How long it is waited before each further try of what could not be read."""

OTHERS = 5
"""How many other images are tried before one is blamed that could not be read; most of them must be given."""

_PLACES = 64
_NEVER_AN_IMAGES_FAULT = frozenset(
    getattr(errno, name)
    for name in (
        *("EMFILE", "ENFILE", "ENOMEM", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN"),
        *("ENETUNREACH", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED"),
    )
    if hasattr(errno, name)
)
_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82"}
"""How files begin -> what is found within their last _END bytes, if they are whole."""
_END = 64


@dataclass(frozen=True)
class Batch:
    """Decoded images, NCHW on the loader's device: float32 and normalised, or uint8; `labels` int64 (n,) beside them.

    `indices` (int64, (n,)) says which images of the source these are, unreadable ones being left out.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: np.ndarray


@dataclass(frozen=True)
class EncodedBatch:
    """Files as they were read: `indices` (n,), their bytes, and `sizes` (n, 2), heights and widths in pixels."""

    indices: np.ndarray
    encoded: list[bytes]
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.encoded)

    def without(self, indices: Collection[int]) -> EncodedBatch:
        """The same batch with the images `indices` left out."""
        keep = [position for position, index in enumerate(self.indices) if int(index) not in indices]
        return EncodedBatch(self.indices[keep], [self.encoded[position] for position in keep], self.sizes[keep])

    def only(self, position: int) -> EncodedBatch:
        """The image at `position` alone."""
        one = slice(position, position + 1)
        return EncodedBatch(self.indices[one], self.encoded[one], self.sizes[one])


class UnreadableImages:
    """The images of `source` that are left out: those `excluded` by name from the start, and those found on the way.

    Each one found is logged with its reason and passed to `on_unreadable` by name. More than `bound` in all raise
    DataError.
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
        """Those of `indices` that are not left out, in their order."""
        if not self._names:
            return indices
        return indices[[self._source.name(int(index)) not in self._names for index in indices]]

    def leave_out(self, index: int, reason: str) -> None:
        """From now on without image `index`."""
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
    """Reads the files of batches ahead of their use, in `threads` threads; lives for many epochs."""

    def __init__(
        self,
        source: ImageSource,
        unreadable: UnreadableImages,
        *,
        threads: int,
        max_batch: int,
        longest: int | None = None,
        takes: Callable[[bytes], bool] = lambda data: True,
    ) -> None:
        """`longest`: longer images than this many times their shorter side are cut to their centre. `takes` says of a
        file whether the decoder knows its format. Both come as bitmaps, decoded here."""
        self._longest, self._takes = longest, takes
        self._as_bitmaps: set[int] = set()
        self._source = source
        self._unreadable = unreadable
        self._threads = threads
        self._max_batch = max_batch
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="image-reader")
        # Height and width of every image seen so far (0: not yet), so that headers are parsed in the first epoch only.
        self._sizes = np.zeros((len(source), 2), np.int32)

    def read(self, batches: Sequence[np.ndarray]) -> Iterator[EncodedBatch]:
        """The batches in order, without their unreadable images; a batch of which nothing is left is skipped.

        A storage's hiccup is no broken image: what cannot be read is tried again, and is left out only while other
        images can be read. Raises DataError when the storage is at fault, and when too many images are unreadable;
        ValueError for a batch larger than `max_batch`.
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
        """The file as the decoder is given it; OSError if it is broken."""
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
        """`batch` with bitmaps for the images `indices`, which from now on always come so."""
        self._as_bitmaps.update(indices)
        encoded = [
            bitmap_of(data, (int(size[0]), int(size[1]))) if int(index) in indices else data
            for index, data, size in zip(batch.indices, batch.encoded, batch.sizes, strict=True)
        ]
        return EncodedBatch(batch.indices, encoded, batch.sizes)

    def decodes_here(self, index: int) -> bool:
        """Whether the image comes as a bitmap already."""
        return index in self._as_bitmaps

    def _finish(self, futures: list[Future[_Chunk]]) -> EncodedBatch:
        chunk = _Chunk.of([future.result() for future in futures])
        if chunk.failures:
            chunk = self._blamed(chunk)
        for index, error in chunk.failures.items():
            self._unreadable.leave_out(index, str(error))
        found = np.array([index for index in chunk.wanted if index in chunk.files], np.int64)
        # Without what was found unreadable while these files were being read.
        indices = self._unreadable.readable(found)
        encoded = [chunk.files[int(index)] for index in indices]
        return EncodedBatch(indices, encoded, self._sizes[indices].astype(np.int64))

    def _blamed(self, chunk: _Chunk) -> _Chunk:
        """`chunk` with those failures only that are the images' own: others could be read, before and after."""
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
        """A few images that have not failed so far, from all over the source."""
        count, first = len(self._source), next(iter(failures))
        places = (first + np.arange(1, min(count, _PLACES)) * max(1, count // _PLACES)) % count
        candidates = self._unreadable.readable(places[[int(index) not in failures for index in places]])
        return candidates[:: max(1, len(candidates) // OTHERS)][:OTHERS].tolist()

    def _gives(self, index: int) -> bool:
        """Whether the storage gives anything for an image, be it broken or not."""
        try:
            return len(self._source.read(index)) > 0
        except OSError:
            return False


@dataclass(frozen=True)
class _Chunk:
    """The images `wanted`, each in one of: `files`, `unread` (not given by the storage), `broken` (given, no image)."""

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
        """What is known when some of the images have been tried `again`."""
        unread = {index: error for index, error in self.unread.items() if index not in again.wanted}
        broken = {index: error for index, error in self.broken.items() if index not in again.wanted}
        return _Chunk(self.wanted, self.files | again.files, unread | again.unread, broken | again.broken)


def checked_size(data: bytes) -> tuple[int, int]:
    """`header_size`, of a file that does not end too early: decoders differ in what of such a file they still show.

    Where the end does not tell, it is decoded. OSError if it is broken.
    """
    size = header_size(data)
    if not any(data.startswith(start) and end in data[-_END:] for start, end in _ENDS.items()):
        whole_bitmap = data[:2] == b"BM" and int.from_bytes(data[2:6], "little") == len(data)
        if not whole_bitmap:
            decode_rgb(data)
    return size


def header_size(data: bytes) -> tuple[int, int]:
    """Height and width that an image file's header tells (EXIF orientation ignored); OSError if it cannot be read."""
    with open_image(data) as image:
        return image.height, image.width


def decode_rgb(data: bytes) -> Image.Image:
    """The fully decoded RGB image (EXIF orientation ignored); OSError if the file is broken."""
    with open_image(data) as image:
        try:
            return _eight_bits(image).convert("RGB")
        except (MemoryError, OSError):
            raise
        except Exception as error:  # Pillow's decoders meet junk with any exception: ValueError, IndexError, ...
            raise OSError(f"{type(error).__name__}: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8, which Pillow would cut off at 255; OSError for pixels whose range is not known."""
    if image.mode == "F":
        raise OSError("its pixels are floating point numbers, of no known range: save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise OSError("its pixels have more than 16 bits, of no known range: save it with 8 or 16")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def centre_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Height and width of the centre of an image, at most `longest` times as long as its shorter side.

    As many rows or columns go on both sides, so that the middle stays the middle.
    """
    bound = longest * min(size)
    height, width = (side if side <= bound else bound - (side - bound) % 2 for side in size)
    return height, width


def bitmap_of(data: bytes, size: tuple[int, int]) -> bytes:
    """A BMP file of the centre of `size` (height, width) of an image file's pixels; OSError if that is broken."""
    image = decode_rgb(data)
    top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
    file = io.BytesIO()
    image.crop((left, top, left + size[1], top + size[0])).save(file, "BMP")
    return file.getvalue()


def decode_error(data: bytes) -> str | None:
    """Why an image file cannot be decoded, or None if it can."""
    try:
        decode_rgb(data)
    except OSError as error:
        return str(error)
    return None


def normalise(images: torch.Tensor, config: DataConfig) -> torch.Tensor:
    """uint8 (N, 3, H, W) to float32: (pixel / 255 - mean) / std of each channel, on the same device."""
    mean = torch.tensor(config.mean, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(config.std, device=images.device).view(1, 3, 1, 1) * 255
    return (images.float() - mean).div_(std)


def open_image(data: bytes) -> Image.Image:
    """The image with its header parsed and its pixels not yet decoded; OSError if that fails."""
    if not data:
        raise OSError("the file is empty")
    try:
        return Image.open(io.BytesIO(data))
    except MemoryError:
        raise
    except Exception as error:
        raise OSError(f"not an image that can be read ({type(error).__name__})") from error


def _some(names: list[str], shown: int = 50) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
