"""A data set of Parquet files, in the column layout of Hugging Face image data sets."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from psutil import virtual_memory

from laasp_ray.data.sources.base import Split, check_labels, is_junk
from laasp_ray.data.sources.row_groups import RowGroups
from laasp_ray.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")
HELD_BYTES = 16 << 30
"""The most bytes of a split's files that are held in memory, if that is at most HELD_SHARE of the free memory."""
HELD_SHARE = 0.25
LARGE_GROUP_BYTES = 64 << 20
"""Row groups above this make reads in random order slow, which is said."""
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet$")
_SPLIT_FOLDERS: dict[Split, tuple[tuple[str, ...], ...]] = {
    "train": (("train",),),
    "test": (("test",), ("val", "validation", "valid")),
}
"""The folders of a split's files in the Hub's own conversion of a data set, `<configuration>/<split>/0000.parquet`."""
_LFS = b"version https://git-lfs"
_PATTERNS = {
    "train": (("train.parquet",), ("train-*.parquet",)),
    "test": (
        ("test.parquet",),
        ("test-*.parquet",),
        ("val.parquet", "validation.parquet"),
        ("val-*.parquet", "validation-*.parquet"),
    ),
}


class ParquetSource:
    """Images in `<root>/train.parquet`, `train-*.parquet` or `train/*.parquet` (sorted), and `test` likewise.

    `val` or `validation` is the test split if there is no `test` or if `test` has no labels. The files are in `root`,
    or in its only folder with such files, for example `data`. Images are a column `img` or `image` of struct<bytes,
    path>. Labels are a column of integers: `label`, or else the first of LABEL_COLUMNS. Class names come from the
    schema's metadata; without them the labels are the names. The encoded images are held in memory; those of larger
    files (HELD_BYTES) are read by row group.
    """

    def __init__(self, root: Path, split: Split, label: str | None = None) -> None:
        files = parquet_files(root, split, label=label)
        if not files:
            looked = " or ".join(name for names in _PATTERNS[split] for name in names)
            folders = " or ".join(f"{name}/*.parquet" for names in _SPLIT_FOLDERS[split] for name in names)
            raise DataError(f"no {split} images in {root}; looked for {looked} or {folders}")
        check_shards(files)
        _check_columns(files, label)
        self._images: pa.ChunkedArray | RowGroups
        if sum(file.stat().st_size for file in files) <= min(HELD_BYTES, HELD_SHARE * virtual_memory().available):
            shards = [_read(file, label) for file in files]
            self._images = pa.chunked_array(
                [chunk for shard in shards for chunk in shard.images.chunks], type=pa.large_binary()
            )
        else:
            shards = [_read(file, label, with_images=False) for file in files]
            self._images = _row_groups(files, label)
        # The Hub's conversion has a 0000.parquet in the folder of each split, and names must tell splits apart.
        in_folder = split_folder_of(files) is not None
        self._files = [f"{file.parent.name}/{file.name}" if in_folder else file.name for file in files]
        self._first_rows = np.cumsum([0] + [len(shard.labels) for shard in shards])
        self.labels = np.concatenate([shard.labels for shard in shards])
        self.classes = _class_names(shards, files)
        check_labels(self.labels, self.classes, split=split, where=str(files[0] if len(files) == 1 else root))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        data = self._images.read(index) if isinstance(self._images, RowGroups) else self._images[index].as_py()
        if data is None:
            raise OSError("the row has no image bytes")
        return data

    def name(self, index: int) -> str:
        file = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return f"{self._files[file]}#{index - self._first_rows[file]}"


def parquet_files(root: Path, split: Split, *, below: bool = True, label: str | None = None) -> list[Path]:
    """The sorted files of `split`, by the first name pattern that has files. A pattern without labels is tried last.

    The files are in `root`, or with `below` in its only folder that has training files.
    """
    folder = _folder(root) if below else root
    found = _sets(folder, split)
    if split == "test" and len(found) > 1:  # the Hub's ImageNet has labels for validation files only
        return next((files for files in found if _labelled(files, label)), found[0])
    return found[0] if found else []


def stored_classes(root: Path, label: str | None = None) -> tuple[str, ...] | None:
    """The names of the classes in the metadata of the first training file, without reading images. None without
    them.
    """
    files = parquet_files(root, "train", label=label)
    if not files:
        return None
    with _readable(files[0]):
        schema = pq.read_schema(files[0])
    return _stored_names(schema, _columns(schema, files[0], label)[1])


def split_folder_of(files: list[Path]) -> str | None:
    """The name of the split's folder that the files are in, if their own names do not tell the split."""
    names = {name for kinds in _SPLIT_FOLDERS.values() for kind in kinds for name in kind}
    own = any(file.match(name) for file in files[:1] for sets in _PATTERNS.values() for some in sets for name in some)
    return files[0].parent.name if files and not own and files[0].parent.name in names else None


def _sets(folder: Path, split: Split) -> list[list[Path]]:
    """The sets of files in `folder` that can be the split, the preferred one first."""
    named = [files for names in _PATTERNS[split] if (files := _matching(folder, names))]
    if named:
        return named
    patterns = [tuple(f"{name}/*.parquet" for name in names) for names in _SPLIT_FOLDERS[split]]
    return [files for names in patterns if (files := _matching(folder, names))]


def check_shards(files: list[Path]) -> None:
    """Raises DataError if one of the files named `NAME-00000-of-00002.parquet` is missing."""
    numbers: dict[tuple[str, int], list[int]] = {}
    for file in files:
        match = _SHARD.match(file.name)
        if match is not None:
            numbers.setdefault((match[1], int(match[3])), []).append(int(match[2]))
    if len(numbers) > 1 or (numbers and sum(map(len, numbers.values())) < len(files)):
        raise DataError(
            f"{files[0].parent} holds files of several sets: {files[0].name} and {files[-1].name}; keep one set"
        )
    for (name, count), here in numbers.items():
        missing = sorted(set(range(count)) - set(here))
        if missing:
            shown = ", ".join(f"{name}-{number:05d}-of-{count:05d}" for number in missing[:5])
            raise DataError(
                f"{files[0].parent} lacks {len(missing)} of the {count} files of {name} ({shown}): fetch them"
            )
        if sorted(here) != list(range(count)):
            raise DataError(f"{files[0].parent} has {len(here)} files of {name}, their names say {count}: keep one set")


def _folder(root: Path) -> Path:
    """The folder of the files: `root`, or its only folder with training files (`data`, or the name of a
    configuration).
    """
    if _sets(root, "train"):
        return root
    with os.scandir(root) as entries:
        below = sorted(Path(entry.path) for entry in entries if not is_junk(entry.name) and entry.is_dir())
    found = [folder for folder in below if _sets(folder, "train")]
    if len(found) > 1:
        listed = ", ".join(str(folder) for folder in found[:5])
        raise DataError(f"{root} has Parquet files in {len(found)} folders ({listed}): give one of them")
    return found[0] if found else root


def _matching(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return sorted(file for name in names for file in folder.glob(name))


def _labelled(files: list[Path], label: str | None) -> bool:
    """Whether any row has a label. Unlabelled files on the Hub have only -1, or no such column."""
    for file in files:
        with _readable(file):
            column = _label_in(pq.read_schema(file), label)
            if column is None:
                continue
            labels = pq.read_table(file, columns=[column])[column]
        if not pa.types.is_integer(labels.type) or pc.any(pc.greater_equal(labels, 0)).as_py():
            return True
    return False


@dataclass(frozen=True)
class _Shard:
    """The encoded images and labels of one file, and its class names if it has them."""

    images: pa.ChunkedArray
    labels: np.ndarray
    classes: tuple[str, ...] | None


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        with file.open("rb") as stream:
            pointer = stream.read(len(_LFS)) == _LFS
        if pointer:
            raise DataError(f"{file} is a pointer of Git LFS, no data yet: run git lfs pull there") from error
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def _check_columns(files: list[Path], wanted: str | None) -> None:
    """Raises DataError if a file does not have the columns, or has its labels in another one than the first file."""
    labels = []
    for file in files:
        with _readable(file):
            schema = pq.read_schema(file)
        labels.append(_columns(schema, file, wanted)[1])
        if labels[-1] != labels[0]:
            raise DataError(
                f"{file} has its labels in {labels[-1]}, {files[0]} in {labels[0]}: keep files of one data set, or "
                "name a column that all have (data.label)"
            )


def _read(file: Path, wanted: str | None, *, with_images: bool = True) -> _Shard:
    with _readable(file):
        schema = pq.read_schema(file)
        image, label = _columns(schema, file, wanted)
        table = pq.read_table(file, columns=[image, label] if with_images else [label])
    images = pa.chunked_array([], type=pa.large_binary())
    if with_images:
        _check_bytes(table[image], file)
        images = _encoded(table, image)
    return _Shard(images, _labels(table, label, file), _stored_names(schema, label))


def _row_groups(files: list[Path], wanted: str | None) -> RowGroups:
    """The images of the files, by row group, and said if that is slow. Raises DataError as `_check_bytes` does."""
    columns = {}
    for file in files:
        with _readable(file):
            columns[file] = _columns(pq.read_schema(file), file, wanted)[0]
    found = RowGroups(columns)
    for file, group in found.without_bytes():
        with _readable(file), pq.ParquetFile(file) as opened:
            rows = opened.read_row_group(group, columns=[columns[file]])
        _check_bytes(rows[columns[file]], file)
    if found.group_bytes > LARGE_GROUP_BYTES:
        logger.warning(
            "%s has row groups of up to %d MB, and each image in random order costs one: write it with smaller ones "
            "(100 rows), or make shards of it, jobs/prepare_data.py %s --out SHARDS",
            files[0].parent,
            found.group_bytes / 1e6,
            files[0].parent,
        )
    return found


def _label_in(schema: pa.Schema, wanted: str | None) -> str | None:
    names = LABEL_COLUMNS if wanted is None else (wanted,)
    return next((name for name in names if name in schema.names), None)


def _columns(schema: pa.Schema, file: Path, wanted: str | None) -> tuple[str, str]:
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = _label_in(schema, wanted)
    if label is None and wanted is not None:
        raise DataError(f"data.label is {wanted!r}, and {file} has the columns {', '.join(schema.names)}: name one")
    if image is None or label is None:
        raise DataError(
            f"{file} has the columns {', '.join(schema.names)}; looked for images in "
            f"{' or '.join(IMAGE_COLUMNS)} and labels in {' or '.join(LABEL_COLUMNS)} (data.label names another column)"
        )
    kind = schema.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise DataError(f"column {image} of {file} is {kind}; expected struct<bytes: binary, path: string>")
    if not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"column {label} of {file} is {schema.field(label).type}; expected int64")
    return image, label


def _encoded(table: pa.Table, column: str) -> pa.ChunkedArray:
    """The images' bytes, with 64-bit offsets, because the total may be more than 2 GiB."""
    chunks = [chunk.field("bytes").cast(pa.large_binary()) for chunk in table[column].chunks]
    return pa.chunked_array(chunks, type=pa.large_binary())


def _labels(table: pa.Table, column: str, file: Path) -> np.ndarray:
    labels = table[column]
    if labels.null_count:
        raise DataError(f"column {column} of {file} has {labels.null_count} rows without a label")
    return labels.to_numpy().astype(np.int64)


def _check_bytes(images: pa.ChunkedArray, file: Path) -> None:
    """Raises DataError if rows have a path instead of bytes. The files at these paths are not read."""
    if images.type.get_field_index("path") < 0:
        return
    bytes_, paths = pc.struct_field(images, "bytes"), pc.struct_field(images, "path")
    elsewhere = paths.filter(pc.and_(pc.is_null(bytes_), pc.is_valid(paths)))
    if len(elsewhere):
        raise DataError(
            f"{file} has {len(elsewhere)} rows with the path of an image ({elsewhere[0].as_py()}) and not its bytes: "
            "write the files with the bytes in them, or sort the images into class folders"
        )


def _class_names(shards: list[_Shard], files: list[Path]) -> tuple[str, ...]:
    other = next((n for n, shard in enumerate(shards) if shard.classes != shards[0].classes), None)
    if other is not None:
        raise DataError(
            f"{files[0]} and {files[other]} do not name the same classes in the same order: keep files of one data set"
        )
    if shards[0].classes is not None:
        return shards[0].classes
    most = max(int(shard.labels.max(initial=-1)) for shard in shards)
    return tuple(str(label) for label in range(most + 1))


def _stored_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return None
    try:
        node: Any = json.loads(stored)
    except ValueError:
        return None
    for key in ("info", "features", label_column, "names"):
        node = node.get(key) if isinstance(node, dict) else None
    return tuple(map(str, node)) if isinstance(node, list) else None
