"""Makes the shards of a split, and goes on where that was stopped.

The images are shuffled once, by the seed, and cut into shards. A shard is a file that is whole or absent, and its
record is written after it: size, digest, and the images left out. A shard counts as finished if it is as its record
says. The list of the shards, `index.json`, is written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from laasp_ray.data.ordering import derive_seed, shuffled
from laasp_ray.data.shards.files import locked, remove_unfinished, write_whole
from laasp_ray.data.shards.samples import sample
from laasp_ray.data.shards.tasks import (
    BadImage,
    CheckTask,
    Images,
    ShardRecord,
    ShardTask,
    Spread,
    VerifyTask,
    chunks,
    results,
)
from laasp_ray.data.sources.base import ImageSource
from laasp_ray.data.sources.identity import identify
from laasp_ray.data.sources.shard_list import INDEX, SHARD_SUFFIX, ShardList, read_shard_list
from laasp_ray.errors import DataError

logger = logging.getLogger(__name__)

LEFT_OUT = "left_out.txt"
"""The images that are in no shard, a line each: name, tab, reason."""
_UNDER_WAY = ".preparing"
_PLAN = "plan.json"
_CHECKED_AT_ONCE = 512
_MEASURED = 200
FEWEST, MOST = 1_000, 10_000
USUAL_BYTES = 500_000_000


class Bars(Protocol):
    """Shows how far something is: `bar` is open while it goes on, and gives what counts it on."""

    def bar(self, what: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]: ...


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """How large shards are: exactly `samples` each, or about `megabytes`. With neither about 500 MB, within 1,000 to
    10,000 samples. They differ by at most one sample.
    """

    samples: int | None = None
    megabytes: float | None = None

    def samples_of(self, mean_bytes: float) -> int:
        """The most samples of a shard whose samples have `mean_bytes` in the tar."""
        if self.samples is not None:
            return self.samples
        if self.megabytes is not None:
            return max(1, round(self.megabytes * 1e6 / mean_bytes))
        return min(MOST, max(FEWEST, round(USUAL_BYTES / mean_bytes)))


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What became of a split. `kept` shards were finished before; `existed` says that nothing was left to do."""

    folder: Path
    listed: ShardList
    bad: tuple[BadImage, ...]
    kept: int = 0
    existed: bool = False


def check_images(images: Images, source: ImageSource, spread: Spread, bars: Bars) -> tuple[BadImage, ...]:
    """The images of a split that cannot be read or decoded; every image is decoded in whole."""
    every = np.arange(len(source), dtype=np.int64)
    tasks = [CheckTask(images=images, indices=part) for part in chunks(every, _CHECKED_AT_ONCE)]
    with bars.bar(f"checking the {images.split} images", len(source), "images") as advance:
        found = [bad for part in results(spread(tasks), advance) for bad in part]
    return tuple(sorted(found, key=lambda bad: bad.index))


def prepare(
    images: Images, source: ImageSource, folder: Path, size: ShardSize, seed: int, spread: Spread, bars: Bars
) -> Prepared:
    """Makes the shards of a split in `folder`, which all workers must see.

    Raises DataError if the folder has something else, if the disk is too small or fails, or if a class would be left
    without a training image.
    """
    under_way = folder / _UNDER_WAY
    with _naming(folder):
        mean_bytes = _mean_bytes(source)
        plan = _plan_of(source, size.samples_of(mean_bytes), seed)
        if (folder / INDEX).exists():
            return _existing(folder, plan)
        _check_folder(folder, plan)
        with locked(under_way / "lock") as is_ours:
            if not is_ours:
                raise DataError(f"another process makes shards in {folder} now: let it finish, or stop it first")
            remove_unfinished(folder)
            remove_unfinished(under_way)
            write_whole(under_way / _PLAN, json.dumps(plan).encode())
            tasks = _tasks(images, len(source), folder, plan)
            kept = _finished(tasks, spread, bars)
            remaining = [task for task in tasks if task.path.name not in kept]
            _check_room(folder, mean_bytes * sum(len(task.indices) for task in remaining))
            made = _make(remaining, spread, bars, images)
            records = [(kept | made)[task.path.name] for task in tasks]
            listed = _finish(records, source, images, folder, plan)
            shutil.rmtree(under_way)
    return Prepared(folder=folder, listed=listed, bad=_bad_of(records), kept=len(kept))


def _mean_bytes(source: ImageSource) -> float:
    """The mean size of a sample in a tar, of some images spread over the source."""
    sizes, error = [], None
    for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), _MEASURED), dtype=np.int64)).tolist():
        try:
            data = source.read(index)
            sizes.append(len(sample(index, len(source), source.name(index), data, int(source.labels[index]))))
        except OSError as failed:
            error = failed
    if not sizes:
        raise DataError(f"none of some images of the source can be read, the last one: {error}; see to the storage")
    return float(np.mean(sizes))


def _plan_of(source: ImageSource, per_shard: int, seed: int) -> dict[str, Any]:
    """All that the shards depend on, so that a later start knows whether it goes on with the same."""
    identity = identify(source)
    contents = hashlib.sha256(json.dumps(identity["sample"]).encode()).hexdigest()
    return {
        "images": identity["images"],
        "names": identity["digest"],
        "contents": contents,
        "seed": seed,
        "samples_per_shard": per_shard,
    }


def _existing(folder: Path, plan: Mapping[str, Any]) -> Prepared:
    """The shards that an earlier start has finished."""
    listed = read_shard_list(folder)
    _check_plan(folder, listed.made_from, plan)
    if (folder / _UNDER_WAY).is_dir():  # it was killed just before its end
        shutil.rmtree(folder / _UNDER_WAY)
    return Prepared(folder=folder, listed=listed, bad=(), kept=len(listed.shards), existed=True)


def _check_folder(folder: Path, plan: Mapping[str, Any]) -> None:
    """Raises DataError if `folder` has anything but the beginning of these very shards."""
    known = folder / _UNDER_WAY / _PLAN
    if known.is_file():
        try:
            before = json.loads(known.read_bytes())
        except ValueError as error:
            raise DataError(f"{known} is damaged ({error}): remove {folder} and start anew") from error
        _check_plan(folder, before, plan)
    elif folder.exists() and any(path.name != _UNDER_WAY for path in folder.iterdir()):
        raise DataError(f"{folder} has other files already: name another folder with --out, or empty this one")


def _check_plan(folder: Path, before: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    changed = [
        f"{key} was {_short(before.get(key))}, is {_short(plan[key])}" for key in plan if before.get(key) != plan[key]
    ]
    if changed:
        raise DataError(
            f"{folder} has shards of another source or with other options ({'; '.join(changed)}): give the same ones "
            "to go on, or name another folder with --out"
        )


def _short(value: Any) -> str:
    return value[:16] if isinstance(value, str) else str(value)


def _tasks(images: Images, count: int, folder: Path, plan: Mapping[str, Any]) -> list[ShardTask]:
    """The shards: all images in a fixed shuffled order, cut into parts that differ by at most one image."""
    order = shuffled(count, derive_seed(plan["seed"], f"shards/{images.split}"))
    parts = np.array_split(order, math.ceil(count / plan["samples_per_shard"]))
    names = [f"{folder.name}-{number:06d}" for number in range(len(parts))]
    return [
        ShardTask(
            images=images,
            indices=part,
            path=folder / f"{name}{SHARD_SUFFIX}",
            record=folder / _UNDER_WAY / f"{name}.json",
        )
        for name, part in zip(names, parts, strict=True)
    ]


def _finished(tasks: Sequence[ShardTask], spread: Spread, bars: Bars) -> dict[str, ShardRecord]:
    """The records of the shards that are there and as they say, by name."""
    records: dict[str, ShardRecord] = {}
    for task in tasks:
        with contextlib.suppress(FileNotFoundError):
            try:
                record = ShardRecord.from_json(task.record.read_bytes())
            except (ValueError, KeyError, TypeError) as error:
                logger.warning("%s is damaged (%s): its shard is made anew", task.record, error)
                continue
            records[record.shard.name] = record
    if not records:
        return {}
    checks = [VerifyTask(folder=tasks[0].path.parent, shard=record.shard) for record in records.values()]
    with bars.bar("verifying finished shards", sum(check.shard.bytes for check in checks), "bytes") as advance:
        for verified in results(spread(checks), advance):
            if verified.fault:
                logger.warning("%s is made anew: %s", verified.name, verified.fault)
                del records[verified.name]
    return records


def _check_room(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the shards in {folder} need about {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free there: make "
            "room, or name another folder with --out"
        )


def _make(tasks: Sequence[ShardTask], spread: Spread, bars: Bars, images: Images) -> dict[str, ShardRecord]:
    made: dict[str, ShardRecord] = {}
    if not tasks:
        return made
    folder = tasks[0].path.parent
    with bars.bar(f"making {images.split} shards", sum(len(task.indices) for task in tasks), "images") as advance:
        for record in results(spread(tasks), advance):
            path = folder / record.shard.name
            if not path.is_file() or path.stat().st_size != record.shard.bytes:
                raise DataError(
                    f"a worker wrote {path}, and it is not there for the driver: --out must be a folder that all nodes "
                    "share; or use --no-ray"
                )
            made[record.shard.name] = record
    return made


def _finish(
    records: Sequence[ShardRecord], source: ImageSource, images: Images, folder: Path, plan: Mapping[str, Any]
) -> ShardList:
    """Writes what was left out, then the list of the shards."""
    bad = _bad_of(records)
    write_whole(folder / LEFT_OUT, "".join(image.line() for image in bad).encode("utf-8", "surrogateescape"))
    left = np.delete(source.labels, [image.index for image in bad])
    counts = np.bincount(left, minlength=len(source.classes))
    empty = [name for name, count in zip(source.classes, counts.tolist(), strict=True) if count == 0]
    if len(left) == 0 or (images.split == "train" and empty):
        raise DataError(
            f"no {images.split} image can be read of {len(empty)} of {len(source.classes)} classes "
            f"({', '.join(empty[:5])}), see {folder / LEFT_OUT}: repair some, or remove the classes, and name "
            "another --out"
        )
    for record in records:
        if record.shard.samples == 0:
            (folder / record.shard.name).unlink(missing_ok=True)
    shards = tuple(record.shard for record in records if record.shard.samples)
    listed = ShardList(shards=shards, classes=source.classes, made_from=plan)
    write_whole(folder / INDEX, listed.to_json())
    return listed


def _bad_of(records: Sequence[ShardRecord]) -> tuple[BadImage, ...]:
    return tuple(sorted((bad for record in records for bad in record.bad), key=lambda bad: bad.index))


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Raises DataError for an error of the file system where shards are written."""
    try:
        yield
    except OSError as error:
        place = folder if error.filename is None else error.filename
        raise DataError(
            f"shards cannot be written into {folder}: {place}: {error.strerror or error}; see to its room and "
            "permissions, then the same command goes on"
        ) from error
