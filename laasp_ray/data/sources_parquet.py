"""A data set as Parquet files, in the column layout of Hugging Face image data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from laasp_ray.data.source import Split, check_labels
from laasp_ray.errors import DataError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels")
MAX_BYTES = 16 << 30
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
    """`<root>/train.parquet` or `train-*.parquet` (sorted), and `test` likewise (else `val` or `validation`).

    Images are a column `img` or `image` of struct<bytes, path>, labels a column `label` or `labels` of integers; class
    names come from the schema's metadata, and are the labels themselves where it has none. The encoded images are held
    in memory, so files of more than 16 GiB are refused.
    """

    def __init__(self, root: Path, split: Split) -> None:
        files = parquet_files(root, split)
        if not files:
            looked = " or ".join(name for names in _PATTERNS[split] for name in names)
            raise DataError(f"no {split} images in {root}; looked for {looked}")
        total = sum(file.stat().st_size for file in files)
        if total > MAX_BYTES:
            raise DataError(
                f"the Parquet files of {split} in {root} have {total / 2**30:.1f} GiB: every worker holds "
                f"them in memory, so at most {MAX_BYTES >> 30} GiB; unpack them into class folders"
            )
        tables = [_read(file) for file in files]
        image_column, label_column = _columns(tables[0].schema, files[0])
        images = [_encoded(table, image_column) for table in tables]
        self._images = pa.chunked_array([chunk for column in images for chunk in column.chunks], type=pa.large_binary())
        self._files = [file.name for file in files]
        self._first_rows = np.cumsum([0] + [len(table) for table in tables])
        self.labels = np.concatenate(
            [_labels(table, label_column, file) for table, file in zip(tables, files, strict=True)]
        )
        self.classes = _class_names(tables[0].schema, label_column, self.labels)
        check_labels(self.labels, self.classes, split=split, where=str(files[0] if len(files) == 1 else root))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        data = self._images[index].as_py()
        if data is None:
            raise OSError("the row has no image bytes")
        return data

    def name(self, index: int) -> str:
        file = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return f"{self._files[file]}#{index - self._first_rows[file]}"


def parquet_files(root: Path, split: Split) -> list[Path]:
    """The files of `split` in `root`, sorted: those of the first naming that is there at all."""
    for names in _PATTERNS[split]:
        files = sorted(file for name in names for file in root.glob(name))
        if files:
            return files
    return []


def _read(file: Path) -> pa.Table:
    try:
        schema = pq.read_schema(file)
        return pq.read_table(file, columns=list(_columns(schema, file)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def _columns(schema: pa.Schema, file: Path) -> tuple[str, str]:
    found = [next((name for name in names if name in schema.names), None) for names in (IMAGE_COLUMNS, LABEL_COLUMNS)]
    image, label = found
    if image is None or label is None:
        raise DataError(
            f"{file} has the columns {', '.join(schema.names)}; looked for images in "
            f"{' or '.join(IMAGE_COLUMNS)} and labels in {' or '.join(LABEL_COLUMNS)}"
        )
    kind = schema.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise DataError(f"column {image} of {file} is {kind}; expected struct<bytes: binary, path: string>")
    if not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"column {label} of {file} is {schema.field(label).type}; expected int64")
    return image, label


def _encoded(table: pa.Table, column: str) -> pa.ChunkedArray:
    """The images' bytes; 64-bit offsets, since more than 2 GiB may come together."""
    chunks = [chunk.field("bytes").cast(pa.large_binary()) for chunk in table[column].chunks]
    return pa.chunked_array(chunks, type=pa.large_binary())


def _labels(table: pa.Table, column: str, file: Path) -> np.ndarray:
    labels = table[column]
    if labels.null_count:
        raise DataError(f"column {column} of {file} has {labels.null_count} rows without a label")
    return labels.to_numpy().astype(np.int64)


def _class_names(schema: pa.Schema, label_column: str, labels: np.ndarray) -> tuple[str, ...]:
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is not None:
        node: Any = json.loads(stored)
        for key in ("info", "features", label_column, "names"):
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, list):
            return tuple(map(str, node))
    return tuple(str(label) for label in range(int(labels.max(initial=-1)) + 1))
