"""Every format of a data set: what comes out, and what is said when it is not as expected."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from laasp_ray.config import DataConfig
from laasp_ray.data.sources.cifar import bitmap
from laasp_ray.data.sources.registry import open_source
from laasp_ray.errors import ConfigError, DataError

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"


def png(value, size=(4, 4)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def config(path, format="auto"):
    return DataConfig(path=str(path), format=format, image_size=32)


def put(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())


def write_parquet(file, rows, *, names=None, image="img", label="label"):
    images = pa.array(
        [{"bytes": data, "path": None} for data, _ in rows], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    table = pa.table({image: images, label: pa.array([value for _, value in rows], pa.int64())})
    if names is not None:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, file, row_group_size=2)


def write_cifar(folder, rows=20):
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, rows, 3072), dtype=np.uint8)
    for number, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        content = {b"data": pixels[number], b"labels": [row % 10 for row in range(rows)]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {b"label_names": [f"kind{n}".encode() for n in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return pixels


# ---- class folders


def test_folders_are_sorted_and_only_images_count(tmp_path):
    put(
        tmp_path,
        "train/b/2.JPEG",
        "train/b/1.png",
        "train/a/x.webp",
        "train/a/X.Jpg",
        "train/a/notes.txt",
        "train/a/.hidden.jpg",
        "val/b/9.bmp",
        "val/a/8.jpeg",
    )
    train, test = open_source(config(tmp_path), "train"), open_source(config(tmp_path), "test")
    assert train.classes == test.classes == ("a", "b")
    assert [train.name(i) for i in range(len(train))] == [
        "train/a/X.Jpg",
        "train/a/x.webp",
        "train/b/1.png",
        "train/b/2.JPEG",
    ]
    assert train.labels.tolist() == [0, 0, 1, 1] and train.labels.dtype == np.int64
    assert train.read(2) == b"train/b/1.png"
    assert [test.name(i) for i in range(len(test))] == ["val/a/8.jpeg", "val/b/9.bmp"]


def test_labels_of_test_images_follow_the_training_classes(tmp_path):
    put(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "test/c/1.jpg")
    test = open_source(config(tmp_path), "test")
    assert test.labels.tolist() == [2] and test.name(0) == "test/c/1.jpg"


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (["train/a/1.jpg", "val/zebra/1.jpg"], "test", "1 class folders that the training images do not have .zebra."),
        (["train/a/1.jpg", "train/b/readme.txt"], "train", "no training image of 1 of its 2 classes .b."),
        (["train/a/1.jpg"], "test", "no test images in .*looked for .*val/<class> or .*test/<class>"),
        (["train/a/1.jpg", "val/a/readme.txt"], "test", "val has no images"),
        (
            ["train/a/1.jpg", "val/ILSVRC2012_val_00000001.JPEG"],
            "test",
            r"val holds images of all classes, and no list says which: give .* one of val_labels\.txt.*class folders",
        ),
        (["n01/1.jpg"], "train", "no data set that is known in .*train/<class>/.*train.parquet.*data_batch_1"),
    ],
)
def test_folders_that_do_not_fit_are_named(tmp_path, files, split, message):
    put(tmp_path, *files)
    with pytest.raises(DataError, match=message):
        open_source(config(tmp_path), split)


def test_explicit_format_says_what_it_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"looked for .*train/<class>"):
        open_source(config(tmp_path, "folder"), "train")
    with pytest.raises(DataError, match=r"looked for test.parquet or test-\*.parquet or val.parquet"):
        open_source(config(tmp_path, "parquet"), "test")
    with pytest.raises(DataError, match=r"looked for data_batch_1 and .*, and for CIFAR-100's cifar-100-python/train"):
        open_source(config(tmp_path, "cifar_batches"), "train")
    with pytest.raises(DataError, match=r"no data set at .*nowhere"):
        open_source(config(tmp_path / "nowhere"), "train")


def test_digits_and_a_path_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match=r"leave one of the two out"):
        open_source(config(tmp_path, "digits"), "train")
    with pytest.raises(ConfigError, match=r"'parquet' without data.path"):
        open_source(DataConfig(format="parquet", image_size=32), "train")


# ---- Parquet


def test_parquet_in_several_files(tmp_path):
    write_parquet(tmp_path / "train-00001.parquet", [(png(3), 0)], image="image", label="labels")
    write_parquet(tmp_path / "train-00000.parquet", [(png(v), v % 2) for v in range(3)], image="image", label="labels")
    write_parquet(tmp_path / "validation.parquet", [(png(9), 1), (png(8), 0)], names=["even", "odd"])
    train, test = open_source(config(tmp_path), "train"), open_source(config(tmp_path), "test")
    assert train.labels.tolist() == [0, 1, 0, 0] and train.classes == ("0", "1")
    assert [train.read(i) for i in range(4)] == [png(0), png(1), png(2), png(3)]
    assert [train.name(i) for i in (0, 2, 3)] == [
        "train-00000.parquet#0",
        "train-00000.parquet#2",
        "train-00001.parquet#0",
    ]
    assert test.classes == ("even", "odd") and test.read(0) == png(9)


def test_parquet_row_without_bytes_is_unreadable(tmp_path):
    write_parquet(tmp_path / "train.parquet", [(None, 0)])
    with pytest.raises(OSError, match=r"no image bytes"):
        open_source(config(tmp_path), "train").read(0)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([(b"", 0), (b"", 5)], {"names": ["a", "b"]}, "image number 1 has the label 5, of 2 classes"),
        ([(b"", 0), (b"", -1)], {"names": ["a", "b"]}, "image number 1 has the label -1"),
        ([(b"", 0)], {"names": ["a", "b"]}, "no training image of 1 of its 2 classes .b."),
        ([(b"", 0)], {"image": "picture"}, "columns picture, label; looked for images in img or image"),
        ([(b"", 0)], {"label": "y"}, r"labels in label or labels or fine_label \(data.label names another column\)"),
        ([], {}, "has no images"),
        ([(b"", None)], {}, "1 rows without a label"),
    ],
)
def test_parquet_that_does_not_fit_is_named(tmp_path, rows, options, message):
    write_parquet(tmp_path / "train.parquet", rows, **options)
    with pytest.raises(DataError, match=message):
        open_source(config(tmp_path), "train")


def test_parquet_of_other_columns_or_junk(tmp_path):
    pq.write_table(pa.table({"img": [b"x"], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"column img of .* is binary; expected struct"):
        open_source(config(tmp_path), "train")
    (tmp_path / "train.parquet").write_bytes(b"junk" * 10)
    with pytest.raises(DataError, match=r"train.parquet cannot be read as Parquet"):
        open_source(config(tmp_path), "train")


def test_cifar10_mini_reads_as_documented():
    if not (SHARED / "cifar10_mini").is_dir():
        pytest.skip("../shared/data/cifar10_mini is not there")
    train = open_source(config(SHARED / "cifar10_mini"), "train")
    test = open_source(config(SHARED / "cifar10_mini"), "test")
    assert (len(train), len(test)) == (4000, 1000)
    assert train.classes[:2] == test.classes[:2] == ("airplane", "automobile") and len(train.classes) == 10
    assert Image.open(io.BytesIO(train.read(3999))).size == (32, 32)


# ---- CIFAR-10's own batches


@pytest.mark.parametrize("nested", [True, False])
def test_cifar_batches_are_lossless(tmp_path, nested):
    pixels = write_cifar(tmp_path / "cifar-10-batches-py")
    root = tmp_path if nested else tmp_path / "cifar-10-batches-py"
    train, test = open_source(config(root), "train"), open_source(config(root), "test")
    assert len(train) == 100 and len(test) == 20
    assert train.classes[9] == "kind9" and train.labels[13] == 3
    assert train.name(27) == "data_batch_2#7" and test.name(0) == "test_batch#0"
    decoded = np.asarray(Image.open(io.BytesIO(train.read(27))))
    assert np.array_equal(decoded, pixels[1, 7].reshape(3, 32, 32).transpose(1, 2, 0))


def test_bitmap_of_a_width_that_needs_padding():
    pixels = np.arange(3 * 2 * 3, dtype=np.uint8).reshape(3, 2, 3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(bitmap(pixels)))), pixels.transpose(1, 2, 0))


class Malicious:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_pickle_that_wants_a_function_is_refused(tmp_path, capsys):
    write_cifar(tmp_path / "batches")
    (tmp_path / "batches" / "data_batch_3").write_bytes(pickle.dumps({b"data": Malicious()}))
    with pytest.raises(DataError, match=r"data_batch_3 is not one of CIFAR-10's batches: it wants builtins.print"):
        open_source(config(tmp_path / "batches"), "train")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, "one integer in 'labels' for each of its 2 images"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [1, 2]}, "no uint8 array 'data' of 3072 columns"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "has the label 10, of 10 classes"),
        ([1, 2], "holds a list, expected a dictionary"),
    ],
)
def test_cifar_batches_that_do_not_fit_are_named(tmp_path, content, message):
    write_cifar(tmp_path / "batches")
    (tmp_path / "batches" / "data_batch_2").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match=message):
        open_source(config(tmp_path / "batches"), "train")


def test_a_missing_batch_is_named(tmp_path):
    write_cifar(tmp_path / "batches")
    (tmp_path / "batches" / "data_batch_4").unlink()
    with pytest.raises(DataError, match=r"data_batch_4 is missing"):
        open_source(config(tmp_path / "batches"), "train")
