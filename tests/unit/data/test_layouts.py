"""Data sets as people have them on disk: each is read whole, or refused in a sentence that names what does not fit."""

import io
import logging
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_sources import config, png, put, write_parquet

from laasp_ray.data.loaders.registry import make_loader
from laasp_ray.data.sources import base as source_module
from laasp_ray.data.sources import folder as sources_folder
from laasp_ray.data.sources.registry import open_source
from laasp_ray.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LAASP_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
    source_module._warn_once.cache_clear()


def names(source):
    return [source.name(index) for index in range(len(source))]


def both(root):
    return open_source(config(root), "train"), open_source(config(root), "test")


# ---- folders


def test_images_in_subfolders_and_of_every_suffix_of_imagefolder_are_read(tmp_path):
    files = [f"train/a/{n}{suffix}" for n, suffix in enumerate(source_module.SUFFIXES)]
    put(tmp_path, *files, "train/a/deep/er/x.JPG", "train/b/images/y.TIF", "val/a/in/z.ppm")
    train, test = both(tmp_path)
    assert names(train) == [*files, "train/a/deep/er/x.JPG", "train/b/images/y.TIF"]
    assert train.labels.tolist() == [0] * 10 + [1] and train.read(9) == b"train/a/deep/er/x.JPG"
    assert names(test) == ["val/a/in/z.ppm"]


def test_the_suffixes_are_torchvisions():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(source_module.SUFFIXES) == set(IMG_EXTENSIONS)


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_both_loaders_decode_every_lossless_suffix_alike(tmp_path, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    (tmp_path / "train" / "a").mkdir(parents=True)
    for kind in ("png", "ppm", "bmp", "tif", "tiff"):
        Image.fromarray(pixels).save(tmp_path / "train" / "a" / f"1.{kind}")
    Image.fromarray(pixels).save(tmp_path / "train" / "a" / "1.webp", lossless=True)
    settings = config(tmp_path)
    settings = type(settings)(path=settings.path, image_size=32, loader=loader, threads=1, eval_resize=0)
    train = open_source(settings, "train")
    import torch

    made = make_loader(train, settings, training=False, device=torch.device("cpu"), max_batch=6, uint8=True)
    try:
        (batch,) = made.epoch([np.arange(6)])
    finally:
        made.close()
    assert all(np.array_equal(image.numpy().transpose(1, 2, 0), pixels) for image in batch.images)


def test_what_is_no_image_is_counted_and_named_once(tmp_path, caplog):
    put(tmp_path, "train/a/1.jpg", "train/a/2.gif", "train/a/sub/3.gif", "train/loose.jpg", "train/a/b.heic")
    with caplog.at_level(logging.WARNING):
        open_source(config(tmp_path), "train")
        open_source(config(tmp_path), "train")
    (message,) = caplog.messages
    assert f"4 files in {tmp_path / 'train'} are not read (2 .gif, 1 .jpg, 1 .heic)" in message
    assert "a/2.gif" in message and "loose.jpg" in message


def test_what_systems_leave_behind_is_no_data(tmp_path, caplog):
    put(
        tmp_path, "train/a/1.jpg", "train/a/._1.jpg", "train/.DS_Store", "train/__MACOSX/a/._1.jpg", "train/a/Thumbs.db"
    )
    put(tmp_path, "train/lost+found/x", "val/a/1.jpg", "val/.DS_Store", "val/__MACOSX/x.jpg")
    train, test = both(tmp_path)
    assert train.classes == ("a",) and names(train) == ["train/a/1.jpg"] and names(test) == ["val/a/1.jpg"]
    assert not caplog.messages


def test_a_link_to_a_folder_above_is_not_followed_for_ever(tmp_path):
    put(tmp_path, "train/a/1.jpg")
    (tmp_path / "train" / "a" / "again").symlink_to(tmp_path / "train" / "a")
    assert names(open_source(config(tmp_path), "train")) == ["train/a/1.jpg"]


@pytest.mark.parametrize("place", ["", "train", "train/b"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, place):
    put(tmp_path, *(["train/a/1.jpg", "train/b/1.jpg"] if place else ["a/1.jpg"]))
    real, refused = os.scandir, tmp_path / place

    def scandir(path):
        if os.fsdecode(path) == str(refused):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(sources_folder.os, "scandir", scandir)
    with pytest.raises(DataError, match=f"cannot be read: {refused}: Permission denied"):
        open_source(config(tmp_path), "train")


def test_a_path_that_no_system_takes(tmp_path):
    with pytest.raises(DataError, match=r"File name too long"):
        open_source(config("/" + "x" * 5000), "train")
    with pytest.raises(ConfigError, match=r"data\.path is empty"):
        open_source(config(""), "train")
    with pytest.raises(ConfigError, match=r"no such user's home"):
        open_source(config("~nosuchuser/x"), "train")


def test_tiny_imagenet_as_unpacked(tmp_path, caplog):
    put(tmp_path, "wnids.txt", "words.txt", "test/images/test_0.JPEG")
    put(tmp_path, "train/n02/images/n02_0.JPEG", "train/n02/n02_boxes.txt", "train/n01/images/n01_0.JPEG")
    put(tmp_path, *[f"val/images/val_{n}.JPEG" for n in range(3)])
    lines = ["val_0.JPEG\tn02\t0\t32\t44\t62", "val_1.JPEG\tn01\t52\t55\t57\t59", "val_2.JPEG\tn02\t4\t0\t60\t55"]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    train, test = both(tmp_path)
    assert names(train) == ["train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG"]
    assert test.classes == train.classes == ("n01", "n02")
    assert list(zip(names(test), test.labels.tolist(), strict=True)) == [
        ("val/images/val_1.JPEG", 0),
        ("val/images/val_0.JPEG", 1),
        ("val/images/val_2.JPEG", 1),
    ]
    assert test.read(0) == b"val/images/val_1.JPEG"


# ---- lists of labels


def flat(tmp_path, files, content, encoding="utf-8"):
    put(tmp_path, "train/great white shark/1.jpg", "train/n01/1.jpg", *[f"val/{file}" for file in files])
    (tmp_path / "val_labels.txt").write_bytes(content.encode(encoding))
    test = open_source(config(tmp_path), "test")
    return {
        name.removeprefix("val/"): test.classes[label] for name, label in zip(names(test), test.labels, strict=True)
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [" ", ", ", "\t"])
def test_marks_of_encodings_and_spaces_in_names(tmp_path, encoding, separator):
    lines = [("a b.jpg", "n01"), ("a.jpg", "great white shark"), ("\u00e4 (1).png", "n01"), ("c.jpg", "n01 3 4 5 6")]
    read = flat(tmp_path, [file for file, _ in lines], "\r\n".join(separator.join(line) for line in lines), encoding)
    assert read == {"a b.jpg": "n01", "a.jpg": "great white shark", "\u00e4 (1).png": "n01", "c.jpg": "n01"}


def test_a_mark_before_classes_alone(tmp_path):
    read = flat(tmp_path, ["1.jpg", "2.jpg"], "n01\ngreat white shark\n", "utf-8-sig")
    assert read == {"1.jpg": "n01", "2.jpg": "great white shark"}


def test_one_stem_with_two_suffixes_has_two_labels(tmp_path):
    read = flat(tmp_path, ["x.jpg", "x.png"], "x.jpg n01\nx.png great white shark\n")
    assert read == {"x.jpg": "n01", "x.png": "great white shark"}


@pytest.mark.parametrize(
    ("files", "content", "message"),
    [
        (["x.jpg", "x.png"], "x n01\n", r"cannot tell the images called x apart"),
        (["x.jpg", "x.png"], "n01\nn01\n", r"cannot tell the images called x apart"),
        (["x.jpg"], "x.jpg n01\nx.jpg great white shark\n", r"gives x\.jpg two classes, n01 and great white shark"),
        (["x.bmp"], "x.jpg n01\nx.png great white shark\n", r"several classes for x, and none for x\.bmp"),
    ],
)
def test_lists_that_leave_a_label_open_are_refused(tmp_path, files, content, message):
    with pytest.raises(DataError, match=message):
        flat(tmp_path, files, content)


def test_images_of_a_list_that_are_not_there_are_told(tmp_path, caplog):
    assert flat(tmp_path, ["a.jpg"], "a.jpg n01\nb.jpg n01\n") == {"a.jpg": "n01"}
    assert "1 images in" in caplog.text and "b.jpg" in caplog.text


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_text_of_another_encoding_is_refused(tmp_path, encoding):
    with pytest.raises(DataError, match=r"val_labels\.txt is not text in UTF-8.*save it as UTF-8"):
        flat(tmp_path, ["\u00e4.jpg"], "\u00e4.jpg n01\n", encoding)


# ---- tar


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def test_what_macos_puts_into_a_tar_is_no_class(tmp_path, caplog):
    inner = tar_of([("._1.JPEG", b"junk"), ("1.JPEG", b"one"), ("2.txt", b"text")])
    outer = [(".DS_Store", b"junk"), ("._n01.tar", b"junk"), ("n01.tar", inner), ("__MACOSX/._n01.tar", b"junk")]
    (tmp_path / "train.tar").write_bytes(tar_of(outer))
    train = open_source(config(tmp_path), "train")
    assert train.classes == ("n01",) and names(train) == ["train.tar/n01/1.JPEG"] and train.read(0) == b"one"
    assert any("1 files in" in message and "2.txt" in message for message in caplog.messages)


def test_two_tars_of_one_class_are_refused(tmp_path):
    inner = tar_of([("1.JPEG", b"one")])
    (tmp_path / "train.tar").write_bytes(tar_of([("a/n01.tar", inner), ("b/n01.tar", inner)]))
    with pytest.raises(DataError, match=r"two tars of the class n01: a/n01\.tar and b/n01\.tar"):
        open_source(config(tmp_path), "train")


def test_members_of_one_name_and_links_in_a_tar(tmp_path, caplog):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in [("a/1.JPEG", b"old"), ("b/1.JPEG", b"other"), ("a/1.JPEG", b"new")]:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        entry = tarfile.TarInfo("link.JPEG")
        entry.type, entry.linkname = tarfile.LNKTYPE, "a/1.JPEG"
        archive.addfile(entry)
    (tmp_path / "train.tar").write_bytes(tar_of([("n01.tar", file.getvalue())]))
    train = open_source(config(tmp_path), "train")
    assert names(train) == ["train.tar/n01/a/1.JPEG", "train.tar/n01/b/1.JPEG"]
    assert [train.read(0), train.read(1)] == [b"new", b"other"]
    assert any("link.JPEG" in message for message in caplog.messages)


# ---- Parquet


KINDS = ["cat", "dog"]


def test_shards_that_call_the_images_differently(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [(png(1), 0)], names=KINDS, image="img")
    write_parquet(tmp_path / "train-1.parquet", [(png(2), 1)], names=["cat", "dog"], image="image")
    train = open_source(config(tmp_path), "train")
    assert train.labels.tolist() == [0, 1] and [train.read(n) for n in (0, 1)] == [png(1), png(2)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train-00001-of-00002"], r"lacks 1 of the 2 files of train \(train-00000-of-00002\): fetch them"),
        (["train-00000-of-00003", "train-00002-of-00003"], r"lacks 1 of the 3 files .*train-00001-of-00003"),
        (["train-00000-of-00001", "train-00000-of-00002"], r"files of several sets: train-00000-of-00001"),
        (["train-00000-of-00001", "train-x"], r"files of several sets"),
        (["train-00000-of-00001-aa", "train-00000-of-00001-bb"], r"has 2 files of train, their names say 1"),
    ],
)
def test_shards_that_are_no_whole_set_are_refused(tmp_path, files, message):
    for file in files:
        write_parquet(tmp_path / f"{file}.parquet", [(png(1), 0), (png(2), 1)])
    with pytest.raises(DataError, match=message):
        open_source(config(tmp_path), "train")


@pytest.mark.parametrize("folder", ["", "data", "plain_text"])
@pytest.mark.parametrize("unlabelled", [True, False])
def test_imagenet_as_on_the_hub(tmp_path, folder, unlabelled):
    root = tmp_path / folder
    root.mkdir(exist_ok=True)
    (tmp_path / ".cache").mkdir()
    for number in range(2):
        file = root / f"train-0000{number}-of-00002.parquet"
        write_parquet(file, [(png(number), number)], names=KINDS, image="image")
    write_parquet(root / "validation-00000-of-00001.parquet", [(png(5), 1)], names=KINDS, image="image")
    hidden = [(png(7), -1 if unlabelled else 0), (png(8), -1 if unlabelled else 1)]
    write_parquet(root / "test-00000-of-00001.parquet", hidden, names=KINDS, image="image")
    train, test = both(tmp_path)
    assert train.labels.tolist() == [0, 1] and train.classes == ("cat", "dog")
    assert test.labels.tolist() == ([1] if unlabelled else [0, 1])


def test_unlabelled_test_images_alone_are_refused(tmp_path):
    write_parquet(tmp_path / "test.parquet", [(png(1), -1)], names=KINDS)
    with pytest.raises(DataError, match=r"has the label -1, of 2 classes"):
        open_source(config(tmp_path, "parquet"), "test")


def test_two_sets_in_one_clone_are_named(tmp_path):
    for folder in ("large", "small"):
        (tmp_path / folder).mkdir()
        write_parquet(tmp_path / folder / "train-00000-of-00001.parquet", [(png(1), 0)])
    with pytest.raises(DataError, match=r"Parquet files in 2 folders \(.*large, .*small\): give one of them"):
        open_source(config(tmp_path), "train")


def test_class_folders_come_before_parquet_files_of_a_folder_beside_them(tmp_path):
    put(tmp_path, "train/a/1.jpg")
    (tmp_path / "small").mkdir()
    write_parquet(tmp_path / "small" / "train.parquet", [(png(1), 0)])
    assert names(open_source(config(tmp_path), "train")) == ["train/a/1.jpg"]


def test_paths_without_bytes_are_refused(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": png(1), "path": "a.png"}, {"bytes": None, "path": "images/b.png"}]
    table = pa.table({"image": pa.array(rows, kind), "label": pa.array([0, 0], pa.int64())})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"1 rows with the path of an image \(images/b\.png\) and not its bytes"):
        open_source(config(tmp_path), "train")


def test_shards_of_other_classes_are_refused(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [(png(1), 0)], names=["cat", "dog"])
    write_parquet(tmp_path / "train-1.parquet", [(png(1), 1)], names=["dog", "cat"])
    with pytest.raises(DataError, match=r"train-0.*train-1.* do not name the same classes in the same order"):
        open_source(config(tmp_path), "train")


def test_a_clone_without_its_large_files(tmp_path):
    (tmp_path / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=r"is a pointer of Git LFS, no data yet: run git lfs pull"):
        open_source(config(tmp_path), "train")
