"""Data sets as the Hugging Face Hub and CIFAR-100's authors hand them out: shards, and several labels an image."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_sources import png, write_cifar, write_parquet

from laasp_ray.config import DataConfig
from laasp_ray.data.sources.registry import classes_of, open_source
from laasp_ray.errors import ConfigError, DataError

FINE, COARSE = [f"fine{n}" for n in range(4)], ["few", "many"]


def config(path, label=None, format="auto"):
    return DataConfig(path=str(path), format=format, label=label, image_size=32)


def write_cifar100(file, values, *, image="img", kind=None):
    """A file as the Hub's cifar100 has it: image i has the fine label values[i] and half of it as its coarse label."""
    kind = kind or pa.int64()
    images = pa.array(
        [{"bytes": png(value), "path": None} for value in values],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    fine, coarse = pa.array(values, kind), pa.array([value // 2 for value in values], kind)
    table = pa.table({image: images, "fine_label": fine, "coarse_label": coarse})
    kinds = {"fine_label": FINE, "coarse_label": COARSE}
    features = {name: {"names": names, "_type": "ClassLabel"} for name, names in kinds.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), file)


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00003", "train-00001-of-00003", "train-00002-of-00003", "test-00000-of-00001"),
        ("data/train-00000-of-00003", "data/train-00001-of-00003", "data/train-00002-of-00003", "data/test"),
        ("train/0000", "train/0001", "train/0002", "test/0000"),
        ("cifar100/train/0000", "cifar100/train/0001", "cifar100/train/0002", "cifar100/validation/0000"),
    ],
)
@pytest.mark.parametrize(("label", "classes", "labels"), [
    (None, FINE, [0, 1, 2, 3, 1, 0]),
    ("fine_label", FINE, [0, 1, 2, 3, 1, 0]),
    ("coarse_label", COARSE, [0, 0, 1, 1, 0, 0]),
])  # fmt: skip
def test_shards_of_the_hub(tmp_path, names, label, classes, labels):
    for name, values in zip(names, ([0, 1], [2, 3, 1], [0], [3, 2]), strict=True):
        write_cifar100(tmp_path / f"{name}.parquet", values)
    train, test = (open_source(config(tmp_path, label), split) for split in ("train", "test"))
    assert train.labels.tolist() == labels and len(test) == 2
    assert train.classes == test.classes == tuple(classes) == classes_of(config(tmp_path, label))
    assert [train.read(index) for index in range(6)] == [png(value) for value in (0, 1, 2, 3, 1, 0)]
    every = [source.name(index) for source in (train, test) for index in range(len(source))]
    assert len(set(every)) == 8


def test_classes_without_names_are_counted_in_the_labels(tmp_path):
    write_parquet(tmp_path / "train.parquet", [(png(1), label) for label in (0, 2, 1)], label="labels")
    assert classes_of(config(tmp_path)) == ("0", "1", "2")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("colour", r"data.label is 'colour', and .*train.parquet has the columns img, fine_label, coarse_label: name"),
        ("img", r"column img of .*train.parquet is struct<.*>; expected int64"),
    ],
)
def test_a_column_that_is_no_label_is_named(tmp_path, label, message):
    write_cifar100(tmp_path / "train.parquet", [0, 1, 2, 3])
    with pytest.raises(DataError, match=message):
        open_source(config(tmp_path, label), "train")


def test_shards_with_other_columns_are_refused(tmp_path):
    write_cifar100(tmp_path / "train-00000.parquet", [0, 1, 2, 3])
    write_cifar100(tmp_path / "train-00001.parquet", [2, 3], image="image", kind=pa.int8())  # one data set all the same
    assert open_source(config(tmp_path), "train").labels.tolist() == [0, 1, 2, 3, 2, 3]
    write_parquet(tmp_path / "train-00001.parquet", [(png(1), 0)])
    message = r"train-00001.parquet has its labels in label, .*train-00000.parquet in fine_label: keep files of one"
    with pytest.raises(DataError, match=message):
        open_source(config(tmp_path), "train")
    with pytest.raises(DataError, match=r"data.label is 'fine_label', and .*00001.parquet has the columns img, label"):
        open_source(config(tmp_path, "fine_label"), "train")


def test_a_split_that_is_missing_says_what_was_looked_for(tmp_path):
    write_cifar100(tmp_path / "train-00000-of-00001.parquet", [0, 1, 2, 3])
    with pytest.raises(DataError, match=r"no test images in .*test-\*.parquet or .*test/\*.parquet or val/\*.parquet"):
        open_source(config(tmp_path), "test")


def test_an_empty_label_is_refused():
    with pytest.raises(ConfigError, match=r"data.label is ' ', must be the name of a column"):
        DataConfig(label=" ", image_size=32)


def test_only_layouts_with_several_labels_take_a_label(tmp_path):
    place = tmp_path / "train" / "a"
    place.mkdir(parents=True)
    (place / "1.png").write_bytes(png(1))
    with pytest.raises(ConfigError, match=r"data.label is 'fine_label', and .* is no data set of Parquet files or CIF"):
        open_source(config(tmp_path, "fine_label"), "train")


# ---- CIFAR-100's own files


def write_own(folder):
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name, rows in (("train", [0, 1, 2, 3]), ("test", [3, 0])):
        content = {b"data": pixels[rows], b"fine_labels": rows, b"coarse_labels": [row // 2 for row in rows]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {b"fine_label_names": [name.encode() for name in FINE], b"coarse_label_names": [b"few", b"many"]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return pixels


@pytest.mark.parametrize("nested", [True, False])
def test_cifar_100_as_its_authors_hand_it_out(tmp_path, nested):
    pixels = write_own(tmp_path / "cifar-100-python")
    root = tmp_path if nested else tmp_path / "cifar-100-python"
    train, test = (open_source(config(root), split) for split in ("train", "test"))
    assert (train.classes, train.labels.tolist(), test.labels.tolist()) == (tuple(FINE), [0, 1, 2, 3], [3, 0])
    decoded = np.asarray(Image.open(io.BytesIO(test.read(0))))
    assert np.array_equal(decoded, pixels[3].reshape(3, 32, 32).transpose(1, 2, 0))
    coarse = open_source(config(root, "coarse_label"), "train")
    assert (coarse.classes, coarse.labels.tolist()) == (tuple(COARSE), [0, 0, 1, 1])
    assert (train.name(1), test.name(1)) == ("train#1", "test#1")


def test_labels_that_an_archive_does_not_have_are_named(tmp_path):
    write_own(tmp_path / "hundred" / "cifar-100-python")
    with pytest.raises(DataError, match=r"data.label is 'x', and CIFAR-100 in .* has fine_label and coarse_label"):
        open_source(config(tmp_path / "hundred", "x"), "train")
    write_cifar(tmp_path / "ten" / "cifar-10-batches-py")
    with pytest.raises(DataError, match=r"data.label is 'fine_label', and CIFAR-10 in .* has label"):
        open_source(config(tmp_path / "ten", "fine_label"), "train")
