"""The pieces of work on a data set that processes do side by side: images to check, shards to write, to hash, to list.

A task is a plain value that a worker gets and does alone; what it needs of the data set the worker opens itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from laasp_ray.config import DataConfig
from laasp_ray.data.loaders.decoding import decode_error
from laasp_ray.data.loaders.reading import ImageFeed
from laasp_ray.data.shards.files import read_parts, whole_file, write_whole
from laasp_ray.data.shards.samples import END, sample
from laasp_ray.data.sources.base import ImageSource, Split
from laasp_ray.data.sources.identity import names_of
from laasp_ray.data.sources.registry import open_source
from laasp_ray.data.sources.shard_list import Shard
from laasp_ray.data.sources.webdataset import read_samples
from laasp_ray.errors import DataError

_BATCH = 64
_THREADS = 2


class Task(Protocol):
    """A piece of work. `steps` does it: it yields whole numbers, how much more is done, and at last the result."""

    def steps(self) -> Iterator[Any]: ...


Spread = Callable[[Iterable[Task]], Iterator[Any]]
"""Does tasks, here or on a cluster, and yields the steps of all of them as they come."""


def in_this_process(tasks: Iterable[Task]) -> Iterator[Any]:
    """Does one task after another."""
    for task in tasks:
        yield from task.steps()


@dataclass(frozen=True, kw_only=True)
class Images:
    """A split of a data set as the driver saw it: `digest` is over names, labels and order."""

    data: DataConfig
    split: Split
    digest: str

    def __hash__(self) -> int:
        # The data's own arguments may be anything.
        return hash((self.data.path, self.data.format, self.split, self.digest))

    @staticmethod
    def seen(data: DataConfig, split: Split) -> tuple[Images, ImageSource]:
        """The split, opened anew."""
        _opened.cache_clear()
        source = open_source(data, split)
        return Images(data=data, split=split, digest=names_of(source)["digest"]), source

    def open(self) -> ImageSource:
        """The images as this process sees them. Raises DataError if they are others than the driver saw."""
        return _opened(self)


@functools.lru_cache(maxsize=2)
def _opened(images: Images) -> ImageSource:
    source = open_source(images.data, images.split)
    if names_of(source)["digest"] != images.digest:
        where = images.data.path or images.data.format
        raise DataError(
            f"a worker sees other {images.split} images in {where} than the driver ({len(source)} there): every node "
            "must have the same data set at that path"
        )
    return source


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be read or decoded."""

    index: int
    name: str
    reason: str

    def line(self) -> str:
        """What a list of such images says of it."""
        return f"{self.name}\t{self.reason}\n"


class _BadImages:
    """Takes the place of UnreadableImages in a feed: it keeps the reasons, and there is no bound."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self.found: dict[int, BadImage] = {}

    def readable(self, indices: np.ndarray) -> np.ndarray:
        return indices[[int(index) not in self.found for index in indices]]

    def leave_out(self, index: int, reason: str) -> None:
        line = " ".join(reason.split())  # reasons go into a file with a line each
        self.found.setdefault(index, BadImage(index, self._source.name(index), line))

    def in_order(self) -> tuple[BadImage, ...]:
        return tuple(self.found[index] for index in sorted(self.found))


def _checked(source: ImageSource, indices: np.ndarray, bad: _BadImages) -> Iterator[int | tuple[int, bytes]]:
    """Number and file of each image that can be decoded in whole; the others are added to `bad`. Whole numbers among
    them count all images, good and bad ones.

    Images are read as loaders read them: tried again, and never blamed for a storage that fails (DataError).
    """
    good, counted = 0, 0
    feed = ImageFeed(source, bad, threads=_THREADS, max_batch=_BATCH)
    try:
        for batch in feed.read(chunks(indices, _BATCH)):
            for index, data in zip(batch.indices.tolist(), batch.encoded, strict=True):
                reason = decode_error(data)
                if reason is not None:
                    bad.leave_out(index, reason)
                    continue
                yield index, data
                good += 1
            yield good + len(bad.found) - counted
            counted = good + len(bad.found)
    finally:
        feed.close()
    yield len(indices) - counted


@dataclass(frozen=True, kw_only=True)
class CheckTask:
    """Checks the images at `indices`. The result is a tuple of those that are bad."""

    images: Images
    indices: np.ndarray

    def steps(self) -> Iterator[Any]:
        source = self.images.open()
        bad = _BadImages(source)
        yield from (step for step in _checked(source, self.indices, bad) if isinstance(step, int))
        yield bad.in_order()


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, and the images that are left out of it."""

    shard: Shard
    bad: tuple[BadImage, ...]

    def to_json(self) -> bytes:
        return json.dumps({"shard": asdict(self.shard), "bad": [asdict(image) for image in self.bad]}).encode()

    @staticmethod
    def from_json(raw: bytes) -> ShardRecord:
        """Raises ValueError, KeyError or TypeError if it is none."""
        content = json.loads(raw)
        return ShardRecord(Shard(**content["shard"]), tuple(BadImage(**image) for image in content["bad"]))


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Checks the images at `indices` and writes the good ones into the shard at `path`, in that order.

    The result is the ShardRecord, which is then in the file `record`, too. The tar depends on the images and the order
    only.
    """

    images: Images
    indices: np.ndarray
    path: Path
    record: Path

    def steps(self) -> Iterator[Any]:
        source = self.images.open()
        bad, samples = _BadImages(source), 0
        with whole_file(self.path) as file:
            for step in _checked(source, self.indices, bad):
                if isinstance(step, int):
                    yield step
                    continue
                index, data = step
                file.write(sample(index, len(source), source.name(index), data, int(source.labels[index])))
                samples += 1
            file.write(END)
        shard = Shard(name=self.path.name, sha256=file.sha256, samples=samples, bytes=file.bytes)
        record = ShardRecord(shard, bad.in_order())
        write_whole(self.record, record.to_json())
        yield record


@dataclass(frozen=True)
class Verified:
    """What a shard is found to be; `fault` is empty for one that is as its list says."""

    name: str
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class VerifyTask:
    """Compares the shard in `folder` with what is listed of it. Steps count bytes; the result is a Verified."""

    folder: Path
    shard: Shard

    def steps(self) -> Iterator[Any]:
        path, counted = self.folder / self.shard.name, 0
        digest = hashlib.sha256()
        try:
            size = path.stat().st_size
            for part in read_parts(path) if size == self.shard.bytes else ():
                digest.update(part)
                counted += len(part)
                yield len(part)
        except OSError as error:
            yield self.shard.bytes - counted
            yield Verified(self.shard.name, error.strerror or str(error))
            return
        yield self.shard.bytes - counted
        if size != self.shard.bytes:
            yield Verified(self.shard.name, f"it has {size:,} bytes instead of {self.shard.bytes:,}")
        elif digest.hexdigest() != self.shard.sha256:
            yield Verified(
                self.shard.name, f"its sha256 is {digest.hexdigest()[:16]}..., not {self.shard.sha256[:16]}..."
            )
        else:
            yield Verified(self.shard.name)


@dataclass(frozen=True, kw_only=True)
class ListTask:
    """Hashes the shard at `path` and counts its samples. Steps count bytes; the result is the Shard.

    Raises DataError for a sample that is not right.
    """

    path: Path
    classes: tuple[str, ...] = ()

    def steps(self) -> Iterator[Any]:
        samples = read_samples(self.path, 0, self.classes, [])
        digest, size = hashlib.sha256(), 0
        for part in read_parts(self.path):
            digest.update(part)
            size += len(part)
            yield len(part)
        yield Shard(name=self.path.name, sha256=digest.hexdigest(), samples=len(samples), bytes=size)


def results(steps: Iterable[Any], advance: Callable[[int], None]) -> Iterator[Any]:
    """The results among steps; `advance` gets the numbers."""
    for step in steps:
        if isinstance(step, int):
            advance(step)
        else:
            yield step


def chunks(indices: np.ndarray, size: int) -> Sequence[np.ndarray]:
    """`indices` in parts of at most `size`."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]
