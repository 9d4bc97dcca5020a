"""Checks the shards of a data set against their list, and makes lists for shards that were made elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from laasp_ray.data.shards.files import write_whole
from laasp_ray.data.shards.preparation import Bars
from laasp_ray.data.shards.tasks import ListTask, Spread, Verified, VerifyTask, results
from laasp_ray.data.sources.base import SPLITS
from laasp_ray.data.sources.shard_list import INDEX, ShardList, read_shard_list, shard_files
from laasp_ray.data.sources.webdataset import shards_folder
from laasp_ray.errors import DataError


@dataclass(frozen=True)
class Checked:
    """The shards of one folder, and those that are not as their list says."""

    folder: Path
    listed: ShardList
    faults: tuple[Verified, ...]


def verify(root: Path, spread: Spread, bars: Bars) -> Iterator[Checked]:
    """Reads every shard of the data set in `root` and compares size and sha256 with the list, a split after the other.

    Raises DataError if there are no shards, or a list is missing or damaged.
    """
    for folder in _folders(root):
        listed = read_shard_list(folder)
        tasks = [VerifyTask(folder=folder, shard=shard) for shard in listed.shards]
        with bars.bar(f"verifying {folder.name}", sum(shard.bytes for shard in listed.shards), "bytes") as advance:
            found = {verified.name: verified for verified in results(spread(tasks), advance)}
        faults = tuple(found[shard.name] for shard in listed.shards if found[shard.name].fault)
        yield Checked(folder, listed, faults)


def make_lists(root: Path, spread: Spread, bars: Bars) -> Iterator[Checked]:
    """Writes `index.json` for each split of shards in `root` that has none; a list that is there stays as it is.

    Raises DataError, naming shard and key, for a sample that is not a pair of image and label.
    """
    for folder in _folders(root):
        if (folder / INDEX).is_file():
            yield Checked(folder, read_shard_list(folder), ())
            continue
        paths = shard_files(folder)
        if not paths:
            raise DataError(f"{folder} has compressed tars only: uncompress them (gunzip), images are read at offsets")
        with bars.bar(f"listing {folder.name}", sum(path.stat().st_size for path in paths), "bytes") as advance:
            tasks = [ListTask(path=path) for path in paths]
            found = sorted(results(spread(tasks), advance), key=lambda shard: shard.name)
        listed = ShardList(shards=tuple(found))
        write_whole(folder / INDEX, listed.to_json())
        yield Checked(folder, listed, ())


def _folders(root: Path) -> list[Path]:
    folders = [folder for split in SPLITS if (folder := shards_folder(root, split)) is not None]
    if not folders:
        raise DataError(
            f"no shards in {root}; looked for {root}/train/*.tar, {root}/val/*.tar and {root}/test/*.tar: name the "
            "folder above those of the splits"
        )
    return folders
