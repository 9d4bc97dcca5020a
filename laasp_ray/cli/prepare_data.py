"""`laasp-ray prepare-data` and `jobs/prepare_data.py`: shards from any data set, and checks of data sets and shards."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from laasp_ray.cli.flags import absolute, at_least_1
from laasp_ray.cli.stopping import guarded
from laasp_ray.config import DataConfig
from laasp_ray.data.shards.files import write_whole
from laasp_ray.data.shards.listing import Checked, make_lists, verify
from laasp_ray.data.shards.preparation import LEFT_OUT, Prepared, ShardSize, check_images, prepare
from laasp_ray.data.shards.tasks import BadImage, Images, Spread, in_this_process
from laasp_ray.data.sources.base import SPLITS, Split
from laasp_ray.errors import ConfigError, DataError
from laasp_ray.report.bars import make_bars
from laasp_ray.report.tables import table_lines

_SHOWN = 20
FOLDERS: dict[Split, str] = {"train": "train", "test": "val"}
"""Split -> the folder of its shards below --out."""


def prepare_data(arguments: Sequence[str] | None = None, prog: str = "prepare_data.py") -> int:
    """Runs the command and returns its exit status (cli/stopping.py); 2 also where images or shards are bad."""
    parser = _parser(prog)
    return guarded(lambda: _run(parser.parse_args(arguments)), stopped="stopped; the same command goes on")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="Makes WebDataset shards from a data set, and checks every image on the way. "
        "The same command goes on where it was stopped.",
    )
    parser.add_argument(
        "source",
        nargs="?",
        help="the data set's folder, for --verify and --index that of the shards (default: the digits)",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="FOLDER", help="make shards in FOLDER/train and FOLDER/val")
    what.add_argument("--check-only", action="store_true", help="check every image, write nothing")
    what.add_argument("--verify", action="store_true", help="compare shards with the sha256 in their index.json")
    what.add_argument("--index", action="store_true", help="make index.json for shards that were made elsewhere")
    parser.add_argument("--format", default="auto", help="the layout of the source, by name, or an import path")
    parser.add_argument("--split", choices=SPLITS, help="only this one (default: both)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--samples", type=at_least_1, metavar="N", help="at most so many samples a shard")
    size.add_argument(
        "--shard-mb",
        type=float,
        metavar="MB",
        help="shards of about so many MB (default: 500, of 1,000 to 10,000 samples)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order in which samples are put into shards (default 0)"
    )
    parser.add_argument("--bad-list", type=Path, metavar="FILE", help="with --check-only: write the bad images there")
    parser.add_argument(
        "--ray-address", default=None, help="a cluster to join (default: RAY_ADDRESS, or start one here)"
    )
    parser.add_argument("--no-ray", action="store_true", help="one process, no Ray")
    return parser


def _run(options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _check(options)
    if options.verify or options.index:
        root = Path(absolute(options.source, "the folder of the shards") or "")
        with _spread(options) as spread:
            (_verify if options.verify else _index)(root, spread)
        return
    data = DataConfig(path=absolute(options.source, "the source"), format=options.format)
    splits = [options.split] if options.split else SPLITS
    opened = [Images.seen(data, split)[0] for split in splits]  # both are looked at before hours are spent on one
    with _spread(options) as spread:
        if options.check_only:
            _check_only(opened, options.bad_list, spread)
        else:
            out = Path(absolute(options.out, "--out") or "")
            _prepare(opened, out, ShardSize(samples=options.samples, megabytes=options.shard_mb), options.seed, spread)


def _check(options: argparse.Namespace) -> None:
    if options.out is not None and "://" in options.out:
        raise ConfigError(
            f"--out {options.out}: shards are written to a folder: name one, then copy it (aws s3 sync FOLDER "
            "s3://..., gcloud storage rsync -r FOLDER gs://...)"
        )
    if (options.verify or options.index) and options.source is None:
        raise ConfigError(f"--{'verify' if options.verify else 'index'} needs the folder of the shards: name it first")
    if options.source is not None and "://" in options.source:
        raise ConfigError(
            f"{options.source} is no folder: copy the data set to a disk that all nodes see, and name that"
        )
    if options.shard_mb is not None and not options.shard_mb > 0:
        raise ConfigError(f"--shard-mb is {options.shard_mb:g}, must be more than 0")
    if options.bad_list is not None and not options.check_only:
        raise ConfigError(f"--bad-list goes with --check-only; with --out the list is in {LEFT_OUT} beside the shards")
    if options.bad_list is not None and not options.bad_list.absolute().parent.is_dir():
        raise ConfigError(f"--bad-list {options.bad_list}: there is no folder {options.bad_list.absolute().parent}")


@contextlib.contextmanager
def _spread(options: argparse.Namespace) -> Iterator[Spread]:
    if options.no_ray:
        yield in_this_process
        return
    from laasp_ray.distributed.cluster import connected
    from laasp_ray.distributed.spread import spread_over

    with connected(options.ray_address) as resources:
        yield spread_over(max(1, int(resources.get("CPU", 1))))


def _prepare(opened: Sequence[Images], out: Path, size: ShardSize, seed: int, spread: Spread) -> None:
    rows: list[tuple[str, ...]] = [("split", "shards", "samples", "MB", "left out", "kept")]
    for images in opened:
        folder = out / FOLDERS[images.split]
        done = prepare(images, images.open(), folder, size, seed, spread, make_bars())
        if done.existed:
            print(f"{folder} is finished: nothing to do (--verify reads it through)")
        _print_bad(done.bad, folder / LEFT_OUT)
        rows.append(_row(images.split, done))
    print("\n".join(table_lines(rows)))
    print(f"shards: {out}")


def _row(split: Split, done: Prepared) -> tuple[str, ...]:
    shards = done.listed.shards
    megabytes = sum(shard.bytes for shard in shards) / 1e6
    left_out = done.listed.made_from["images"] - done.listed.samples
    return (split, str(len(shards)), f"{done.listed.samples:,}", f"{megabytes:,.1f}", f"{left_out:,}", str(done.kept))


def _check_only(opened: Sequence[Images], bad_list: Path | None, spread: Spread) -> None:
    bad: list[BadImage] = []
    total = 0
    for images in opened:
        source = images.open()
        total += len(source)
        bad += check_images(images, source, spread, make_bars())
    if bad_list is not None:
        write_whole(bad_list, "".join(image.line() for image in bad).encode("utf-8", "surrogateescape"))
    _print_bad(bad, bad_list)
    if bad:
        raise DataError(f"{len(bad)} of {total} images cannot be read or decoded: repair or remove them")
    print(f"all {total} images can be decoded")


def _print_bad(bad: Sequence[BadImage], where: Path | None) -> None:
    for image in bad[:_SHOWN]:
        print(f"bad: {image.name}: {image.reason}")
    if len(bad) > _SHOWN:
        print(f"and {len(bad) - _SHOWN} more" + (f", all in {where}" if where else " (--bad-list FILE writes all)"))


def _verify(root: Path, spread: Spread) -> None:
    faults = 0
    for found in verify(root, spread, make_bars()):
        for fault in found.faults:
            print(f"bad: {found.folder / fault.name}: {fault.fault}")
        faults += len(found.faults)
        print(_line_of(found, f"{len(found.listed.shards) - len(found.faults)} are as listed"))
    if faults:
        raise DataError(f"{faults} shards in {root} are not as listed: copy them anew, or make them anew")


def _index(root: Path, spread: Spread) -> None:
    for made in make_lists(root, spread, make_bars()):
        print(_line_of(made, "listed in index.json"))


def _line_of(found: Checked, what: str) -> str:
    return f"{found.folder}: {len(found.listed.shards)} shards, {found.listed.samples:,} samples, {what}"
