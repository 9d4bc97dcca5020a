"""Encoded images of Parquet files that are too large for memory: read by row group, a few of which are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KEPT_BYTES = 256 << 20
"""The bytes of images in the row groups that are kept. One is kept in any case."""


class RowGroups:
    """The images of files as one sequence of rows. `columns` has each file's column of images (struct with bytes).

    Only the files' own lists of row groups are in memory. A read takes the image's whole row group from the file, so
    images in order are read once, and images in random order cost a row group each. It may be used by several threads,
    and keeps no file open.
    """

    def __init__(self, columns: Mapping[Path, str]) -> None:
        """Raises ArrowInvalid or OSError if a file cannot be read."""
        self._files = list(columns)
        self._columns = [f"{column}.bytes" for column in columns.values()]
        self._metadata = [pq.read_metadata(file) for file in self._files]
        self._groups = [
            (file, group) for file, data in enumerate(self._metadata) for group in range(data.num_row_groups)
        ]
        rows = [self._metadata[file].row_group(group).num_rows for file, group in self._groups]
        self._first_rows = np.cumsum([0, *rows])
        self._kept: OrderedDict[int, Future[pa.Array]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    @property
    def group_bytes(self) -> int:
        """The bytes of the largest row group's images, as stored."""
        return max((self._chunk(*group).total_compressed_size for group in self._groups), default=0)

    def without_bytes(self) -> list[tuple[Path, int]]:
        """The row groups (file, number) that have rows without bytes, as far as the files' statistics tell."""
        statistics = [(place, self._chunk(*place).statistics) for place in self._groups]
        return [
            (self._files[file], group)
            for (file, group), known in statistics
            if known is not None and known.has_null_count and known.null_count
        ]

    def read(self, index: int) -> bytes | None:
        """The bytes of a row; None if it has none. Raises OSError if they cannot be read."""
        number = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return self._images(number)[index - int(self._first_rows[number])].as_py()

    def _images(self, number: int) -> pa.Array:
        with self._lock:
            future = self._kept.get(number)
            if future is not None:
                self._kept.move_to_end(number)
            else:
                own = self._kept[number] = Future()
        if future is not None:
            return future.result()  # another thread may be reading it now
        try:
            own.set_result(self._read(number))
        except BaseException as error:
            with self._lock:
                self._kept.pop(number, None)
            own.set_exception(error)
            raise
        self._forget()
        return own.result()

    def _read(self, number: int) -> pa.Array:
        file, group = self._groups[number]
        try:
            with pq.ParquetFile(self._files[file], metadata=self._metadata[file]) as opened:
                table = opened.read_row_group(group, columns=[self._columns[file]])
        except (pa.ArrowException, OSError) as error:
            raise OSError(f"row group {group} of {self._files[file]} cannot be read: {error}") from error
        return table.column(0).combine_chunks().field("bytes")

    def _forget(self) -> None:
        """Drops the row groups that were used longest ago, until the rest fits."""
        with self._lock:
            done = [number for number, future in self._kept.items() if future.done()]
            total = sum(self._kept[number].result().nbytes for number in done)
            for number in done[:-1]:
                if total <= KEPT_BYTES:
                    break
                total -= self._kept.pop(number).result().nbytes

    def _chunk(self, file: int, group: int) -> pq.ColumnChunkMetaData:
        rows = self._metadata[file].row_group(group)
        chunks = (rows.column(position) for position in range(rows.num_columns))
        return next(chunk for chunk in chunks if chunk.path_in_schema == self._columns[file])
