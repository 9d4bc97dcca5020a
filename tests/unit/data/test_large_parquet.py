"""Parquet files that are too large for memory: the same images by row group, kept within a limit, by many threads."""

import gc
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import config, write_parquet

from laasp_ray.data.sources import parquet, row_groups
from laasp_ray.data.sources.registry import open_source
from laasp_ray.errors import DataError

SIZE = 20_000


def image(number):
    """SIZE bytes that no compression makes smaller."""
    return np.random.default_rng(number).bytes(SIZE)


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A folder of three files with 7 images, in row groups of two; anything is too large for memory."""
    monkeypatch.setattr(parquet, "HELD_BYTES", 1000)
    for shard, rows in enumerate([(0, 1, 2), (3, 4, 5), (6,)]):
        file = tmp_path / f"train-0000{shard}-of-00003.parquet"
        write_parquet(file, [(image(number), number % 2) for number in rows], image="image", names=["even", "odd"])
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """The row groups that were read, by file and number."""
    found, read = [], pq.ParquetFile.read_row_group

    def counted(self, group, columns=None):
        found.append((group, tuple(columns)))
        return read(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    return found


def test_images_labels_and_names_are_those_of_files_in_memory(large, monkeypatch, reads):
    by_group = open_source(config(large), "train")
    assert not reads  # opening reads no image
    monkeypatch.setattr(parquet, "HELD_BYTES", 1 << 30)
    in_memory = open_source(config(large), "train")
    assert len(by_group) == len(in_memory) == 7 and by_group.classes == in_memory.classes == ("even", "odd")
    assert by_group.labels.tolist() == in_memory.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    for index in (6, 0, 5, 2, 1, 3, 4):
        assert by_group.read(index) == in_memory.read(index) == image(index)
        assert by_group.name(index) == in_memory.name(index)
    assert {columns for _, columns in reads} == {("image.bytes",)}


def test_images_in_order_read_each_row_group_once(large, reads):
    source = open_source(config(large), "train")
    assert [source.read(index) for index in range(7)] == [image(index) for index in range(7)]
    assert [group for group, _ in reads] == [0, 1, 0, 1, 0]


def test_the_row_groups_that_were_used_longest_ago_are_dropped(large, monkeypatch, reads):
    monkeypatch.setattr(row_groups, "KEPT_BYTES", 3 * SIZE + 1000)  # one of two images, and one of one
    source = open_source(config(large), "train")
    for index, read in [(0, 1), (2, 2), (1, 2), (3, 3), (0, 4), (2, 5)]:
        # 0 and 2 fit together; 3 and its neighbour leave no room for either.
        assert source.read(index) == image(index) and len(reads) == read, index


def test_one_row_group_is_kept_however_large_it_is(large, monkeypatch, reads):
    monkeypatch.setattr(row_groups, "KEPT_BYTES", 1)
    source = open_source(config(large), "train")
    for index in (0, 1, 0):
        assert source.read(index) == image(index)
    assert len(reads) == 1


def test_memory_does_not_grow_with_the_files(tmp_path, monkeypatch):
    """100 row groups of two images: what Arrow has allocated stays within the limit and one group in the reading."""
    monkeypatch.setattr(parquet, "HELD_BYTES", 1000)
    monkeypatch.setattr(row_groups, "KEPT_BYTES", 10 * SIZE)
    write_parquet(tmp_path / "train.parquet", [(image(number), 0) for number in range(200)])
    gc.collect()
    before, source = pa.total_allocated_bytes(), open_source(config(tmp_path), "train")
    for index in range(200):
        assert source.read(index) == image(index)
        assert pa.total_allocated_bytes() - before < 20 * SIZE


def test_threads_share_a_read(large, reads):
    source, together = open_source(config(large), "train"), threading.Barrier(4)

    def read(index):
        together.wait()
        return source.read(index)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, [0, 1, 0, 1])) == [image(0), image(1), image(0), image(1)]
    assert len(reads) == 1


def test_a_damaged_row_group_is_an_error_of_its_images_only(large):
    file = large / "train-00001-of-00003.parquet"
    chunk = pq.read_metadata(file).row_group(0).column(0)
    with file.open("r+b") as stream:
        stream.seek(chunk.data_page_offset)
        stream.write(b"\xff" * 64)
    source = open_source(config(large), "train")
    for _ in range(2):  # an error is not kept
        with pytest.raises(OSError, match=r"row group 0 of .*train-00001-of-00003.parquet cannot be read"):
            source.read(3)
    assert source.read(2) == image(2) and source.read(5) == image(5)


def test_rows_with_paths_instead_of_bytes_are_refused(large):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": image(3), "path": None}, {"bytes": None, "path": "cat.jpg"}], kind)
    features = pq.read_schema(large / "train-00000-of-00003.parquet").metadata
    table = pa.table({"image": rows, "label": pa.array([1, 0])}).replace_schema_metadata(features)
    pq.write_table(table, large / "train-00001-of-00003.parquet")
    with pytest.raises(
        DataError, match=r"train-00001-of-00003.parquet has 1 rows with the path of an image \(cat.jpg\)"
    ):
        open_source(config(large), "train")


def test_a_row_without_anything_is_unreadable(large):
    write_parquet(large / "train-00002-of-00003.parquet", [(None, 0)], image="image", names=["even", "odd"])
    with pytest.raises(OSError, match="no image bytes"):
        open_source(config(large), "train").read(6)


def test_large_row_groups_are_said_to_be_slow(large, monkeypatch, caplog):
    monkeypatch.setattr(parquet, "LARGE_GROUP_BYTES", SIZE)
    with caplog.at_level(logging.WARNING):
        open_source(config(large), "train")
    assert "has row groups of up to 0 MB" in caplog.text and "jobs/prepare_data.py" in caplog.text


def test_a_quarter_of_the_free_memory_is_the_limit_too(large, monkeypatch, reads):
    monkeypatch.setattr(parquet, "HELD_BYTES", 1 << 30)

    class Free:
        available = 4 * 7 * SIZE  # the files are a little larger than a quarter of it

    monkeypatch.setattr(parquet, "virtual_memory", Free)
    assert open_source(config(large), "train").read(0) == image(0) and len(reads) == 1
