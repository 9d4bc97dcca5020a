"""Encoded images, read ahead in threads, with the unreadable ones left out: what both loaders start from."""

from __future__ import annotations

import io
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from laasp_ray.config import DataConfig
from laasp_ray.data.source import ImageSource
from laasp_ray.errors import DataError

logger = logging.getLogger(__name__)

BATCHES_READ_AHEAD = 2
RETRY_PAUSES_S = (0.1, 0.5, 2.0)
"""How long it is waited before each further try of what could not be read."""


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

    Each one found is logged with its reason and told to `on_unreadable` by name. More than `bound` in all raise
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
                f"{_some(list(self._names))}; repair or remove them, or raise data.max_unreadable"
            )


class ImageFeed:
    """Reads the files of batches ahead of their use, in `threads` threads; lives for many epochs."""

    def __init__(self, source: ImageSource, unreadable: UnreadableImages, *, threads: int, max_batch: int) -> None:
        self._source = source
        self._unreadable = unreadable
        self._threads = threads
        self._max_batch = max_batch
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="image-reader")
        # Height and width of every image seen so far (0: not yet), so that headers are parsed in the first epoch only.
        self._sizes = np.zeros((len(source), 2), np.int32)

    def read(self, batches: Sequence[np.ndarray]) -> Iterator[EncodedBatch]:
        """The batches in order, without their unreadable images; a batch of which nothing is left is skipped.

        A storage's hiccup is no broken image: what cannot be read is tried again. Raises DataError when of several
        images read together not one can be read, and when too many are unreadable; ValueError for a batch larger than
        `max_batch`.
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
        files, failures = self._read_files([int(index) for index in indices])
        chunk = _Chunk([], [], failures)
        for index, data in files.items():
            try:
                if self._sizes[index, 0] == 0:
                    self._sizes[index] = header_size(data)
            except OSError as error:
                failures[index] = str(error)
                continue
            chunk.indices.append(index)
            chunk.encoded.append(data)
        return chunk

    def _read_files(self, indices: list[int]) -> tuple[dict[int, bytes], dict[int, str]]:
        """What could be read, and why the rest could not, even when it was tried again."""
        files, failures = self._try_files(indices)
        for pause in RETRY_PAUSES_S:
            if not failures:
                break
            index, reason = next(iter(failures.items()))
            logger.warning(
                "%d of %d images could not be read (%s: %s); trying again",
                len(failures),
                len(indices),
                self._source.name(index),
                reason,
            )
            time.sleep(pause)
            found, failures = self._try_files(list(failures))
            files |= found
        if len(failures) == len(indices) > 1:
            index, reason = next(iter(failures.items()))
            raise DataError(
                f"the storage cannot be read: {len(indices)} of {len(indices)} images failed, the first "
                f"{self._source.name(index)}: {reason}; no image is left out for that: see to the storage, then start "
                "the run again"
            )
        return {index: files[index] for index in indices if index in files}, failures

    def _try_files(self, indices: list[int]) -> tuple[dict[int, bytes], dict[int, str]]:
        files: dict[int, bytes] = {}
        failures: dict[int, str] = {}
        for index in indices:
            try:
                files[index] = self._source.read(index)
            except OSError as error:
                failures[index] = str(error)
        return files, failures

    def _finish(self, futures: list[Future[_Chunk]]) -> EncodedBatch:
        chunks = [future.result() for future in futures]
        for chunk in chunks:
            for index, reason in chunk.failures.items():
                self._unreadable.leave_out(index, reason)
        indices = np.array([index for chunk in chunks for index in chunk.indices], np.int64)
        encoded = [data for chunk in chunks for data in chunk.encoded]
        batch = EncodedBatch(indices, encoded, self._sizes[indices].astype(np.int64))
        # What was found unreadable while these files were being read.
        left_out = set(indices.tolist()) - set(self._unreadable.readable(indices).tolist())
        return batch.without(left_out) if left_out else batch


@dataclass(frozen=True)
class _Chunk:
    indices: list[int]
    encoded: list[bytes]
    failures: dict[int, str]


def header_size(data: bytes) -> tuple[int, int]:
    """Height and width that an image file's header tells (EXIF orientation ignored); OSError if it cannot be read."""
    with open_image(data) as image:
        return image.height, image.width


def decode_rgb(data: bytes) -> Image.Image:
    """The fully decoded RGB image (EXIF orientation ignored); OSError if the file is broken."""
    with open_image(data) as image:
        try:
            return image.convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders meet junk with any exception: ValueError, IndexError, ...
            raise OSError(f"{type(error).__name__}: {error}") from error


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
