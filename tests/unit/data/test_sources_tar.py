"""ImageNet's own tars, and flat validation sets with their lists, against the same images as class folders."""

import io
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from helpers import shared_data
from PIL import Image

from laasp_ray.config import DataConfig
from laasp_ray.data.sources import imagenet_tar as sources_tar
from laasp_ray.data.sources.registry import open_source, open_test_source
from laasp_ray.errors import DataError

CLASSES = ("n01440764", "n01443537", "n01484850")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAASP_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (6 + seed % 3, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def tar(path, members):
    """Files in a tar, in this order; with a folder's entry in between, which is none of them."""
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def class_tar(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


TRAIN = {name: [(f"{name}_{n}.JPEG", jpeg(100 * k + n)) for n in (10, 9, 2)] for k, name in enumerate(CLASSES)}
"""Not in the order of their names; ..._10 comes before ..._2 as text."""
VAL = [(f"ILSVRC2012_val_0000000{n}.JPEG", jpeg(n)) for n in range(1, 6)]
VAL_CLASSES = ["n01484850", "n01440764", "n01443537", "n01440764", "n01484850"]


@pytest.fixture
def imagenet(tmp_path):
    """The tars, in a folder; classes and images in no order."""
    root = tmp_path / "imagenet"
    root.mkdir()
    members = [(f"{name}.tar", class_tar(TRAIN[name])) for name in reversed(CLASSES)]
    tar(root / "ILSVRC2012_img_train.tar", members)
    tar(root / "ILSVRC2012_img_val.tar", reversed(VAL))
    write_list(root)
    return root


def write_list(root, name="val_labels.txt", line="{file} {label}"):
    lines = [line.format(file=file, label=label) for (file, _), label in zip(VAL, VAL_CLASSES, strict=True)]
    (root / name).write_text("\n".join(lines) + "\n")


@pytest.fixture
def folders(tmp_path):
    """The same images as class folders."""
    root = tmp_path / "folders"
    placed = [("train", name, *image) for name in CLASSES for image in TRAIN[name]]
    placed += [("val", name, *image) for name, image in zip(VAL_CLASSES, VAL, strict=True)]
    for split, name, file, content in placed:
        (root / split / name).mkdir(parents=True, exist_ok=True)
        (root / split / name / file).write_bytes(content)
    return root


def open_both(root):
    config = DataConfig(path=str(root), image_size=32)
    return open_source(config, "train"), open_source(config, "test")


def decoded(source):
    return [np.asarray(Image.open(io.BytesIO(source.read(index)))) for index in range(len(source))]


def check_equal(ours, theirs):
    assert ours.classes == theirs.classes
    assert ours.labels.tolist() == theirs.labels.tolist() and ours.labels.dtype == theirs.labels.dtype == np.int64
    pictures = decoded(ours), decoded(theirs)
    assert len(pictures[0]) == len(ours) == len(theirs)
    assert all(np.array_equal(a, b) for a, b in zip(*pictures, strict=True))


def test_the_tars_give_what_class_folders_give_image_by_image(imagenet, folders):
    (train, test), (train_folders, test_folders) = open_both(imagenet), open_both(folders)
    check_equal(train, train_folders)
    check_equal(test, test_folders)
    assert train.classes == CLASSES and train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert train.name(0) == "ILSVRC2012_img_train.tar/n01440764/n01440764_10.JPEG"
    assert [test.name(index) for index in range(3)] == [
        f"ILSVRC2012_img_val.tar/ILSVRC2012_val_0000000{n}.JPEG" for n in (2, 4, 3)
    ]
    assert pickle.loads(pickle.dumps(train)).read(4) == train.read(4) == TRAIN[CLASSES[1]][2][1]


def test_real_images_out_of_a_tar(tmp_path):
    sample = shared_data("imagenet_sample")
    names = sorted(path.name for path in sample.iterdir() if path.is_dir())[:20]
    for name in names:
        shutil.copytree(sample / name, tmp_path / "folders" / "train" / name)
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        for name in names:
            with tarfile.open(tmp_path / f"{name}.tar", "w") as inner:
                inner.add(sample / name, name)  # within a folder, as some repack them
            outer.add(tmp_path / f"{name}.tar", f"{name}.tar")
    config = DataConfig(path=str(tmp_path), format="tar", image_size=32)
    found = open_source(config, "train")
    wanted = open_source(DataConfig(path=str(tmp_path / "folders"), image_size=32), "train")
    assert len(found) == len(wanted) == 20
    assert all(found.read(index) == wanted.read(index) for index in range(20))


def test_a_tar_is_indexed_once(imagenet, cache, monkeypatch):
    first = open_both(imagenet)
    kept = sorted(cache.iterdir())
    assert len(kept) == 2 and all(path.suffix == ".npz" for path in kept)

    def never(path, nested):
        raise AssertionError(f"{path} is indexed again")

    with monkeypatch.context() as patch:
        patch.setattr(sources_tar, "_made", never)
        for ours, theirs in zip(open_both(imagenet), first, strict=True):
            check_equal(ours, theirs)
    # Another tar under the same name is noticed.
    tar(imagenet / "ILSVRC2012_img_train.tar", [("n01443537.tar", class_tar(TRAIN["n01443537"][:1]))])
    assert open_source(DataConfig(path=str(imagenet), image_size=32), "train").read(0) == TRAIN["n01443537"][0][1]


def test_an_index_that_cannot_be_kept_or_read_is_told_and_done_without(imagenet, cache, caplog):
    cache.write_text("a file where the folder should be")
    train, _ = open_both(imagenet)
    assert "the index cannot be kept" in caplog.text and "LAASP_RAY_CACHE" in caplog.text
    cache.unlink()
    open_both(imagenet)
    for path in cache.iterdir():
        path.write_bytes(b"junk")
    again, _ = open_both(imagenet)
    assert "is indexed anew" in caplog.text
    check_equal(again, train)


@pytest.mark.parametrize("repacked", ["flat folder", "class folders"])
def test_an_unpacked_validation_set_beside_the_training_tar(imagenet, folders, repacked):
    (imagenet / "ILSVRC2012_img_val.tar").unlink()
    if repacked == "flat folder":
        (imagenet / "val").mkdir()
        for file, content in VAL:
            (imagenet / "val" / file).write_bytes(content)
    else:
        shutil.copytree(folders / "val", imagenet / "val")
    _, test = open_both(imagenet)
    check_equal(test, open_both(folders)[1])
    name = "ILSVRC2012_val_00000002.JPEG"
    assert test.name(0) == (f"val/{name}" if repacked == "flat folder" else f"val/n01440764/{name}")


def test_a_flat_validation_set_beside_class_folders(imagenet, folders):
    mixed = imagenet / "mixed"
    shutil.copytree(folders / "train", mixed / "train")
    shutil.copy(imagenet / "ILSVRC2012_img_val.tar", mixed)
    shutil.copy(imagenet / "val_labels.txt", mixed)
    for ours, theirs in zip(open_both(mixed), open_both(folders), strict=True):
        check_equal(ours, theirs)


def as_numbers(root):
    numbers = {"n01484850": 1, "n01440764": 2, "n01443537": 3}  # the devkit's order is none of the names'
    lines = [str(numbers[name]) for name in VAL_CLASSES]
    (root / "class_numbers.txt").write_text("".join(f"{number} {name}\n" for name, number in numbers.items()))
    (root / "ILSVRC2012_devkit_t12" / "data").mkdir(parents=True)
    path = root / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    path.write_text("\n".join(lines))


LISTS = {
    "names and classes": lambda root: write_list(root),
    "in another order": lambda root: (root / "val_labels.txt").write_text(
        "".join(f"{file}, {label}\n" for (file, _), label in list(zip(VAL, VAL_CLASSES, strict=True))[::-1])
    ),
    "classes alone": lambda root: write_list(root, line="{label}"),
    "numbers": as_numbers,
    "the challenge's table": lambda root: (root / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        + "".join(
            f"{file.removesuffix('.JPEG')},{label} 85 1 499 272 {label} 1 2 3 4\n"
            for (file, _), label in zip(VAL, VAL_CLASSES, strict=True)
        )
    ),
}


@pytest.mark.parametrize("form", LISTS)
def test_every_form_of_the_label_list(imagenet, folders, form):
    (imagenet / "val_labels.txt").unlink()
    LISTS[form](imagenet)
    check_equal(open_both(imagenet)[1], open_both(folders)[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"ILSVRC2012_img_val\.tar holds images of all classes, and no list says which: .*val_labels\.txt"),
        ("n01440764\n" * 4, r"val_labels\.txt has 4 lines for 5 images"),
        ("n01440764\n" * 4 + "n99999999\n", r"1 classes that the training images do not have \(n99999999\)"),
        ("ILSVRC2012_val_00000001.JPEG n01440764\n", r"lacks 4 of 5 images \(ILSVRC2012_val_0000000[1-5]"),
        ("a.JPEG n01440764\nn01440764\n", r"lines of one word and of more, such as 'n01440764'"),
        ("1\n2\n3\n1\n2\n", r"gives classes by number.*class_numbers\.txt beside it, lines such as '1 n02119789'"),
    ],
)
def test_a_label_list_that_does_not_fit_is_named(imagenet, content, message):
    (imagenet / "val_labels.txt").unlink()
    if content is not None:
        (imagenet / "val_labels.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(path=str(imagenet), image_size=32), "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "1 n01440764\n2 n01443537\n",
            r"class_numbers\.txt lacks 1 of the class numbers in .*_labels\.txt \(\[3\]\)",
        ),
        ("n01440764 1\n", r"class_numbers\.txt has the line 'n01440764 1', expected 'NUMBER CLASS'"),
    ],
)
def test_a_file_of_class_numbers_that_does_not_fit_is_named(imagenet, content, message):
    (imagenet / "val_labels.txt").write_text("1\n2\n3\n1\n2\n")
    (imagenet / "class_numbers.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(path=str(imagenet), image_size=32), "test")


@pytest.mark.parametrize("format", ["auto", "tar", "folder"])
@pytest.mark.parametrize("training", ["there", "gone", "damaged"])
def test_test_images_are_opened_without_the_training_tar(imagenet, monkeypatch, format, training):
    expected = open_source(DataConfig(path=str(imagenet), image_size=32), "test")
    path = imagenet / "ILSVRC2012_img_train.tar"
    path.write_bytes(b"") if training == "damaged" else path.unlink() if training == "gone" else None
    indexed, made = [], sources_tar._made
    monkeypatch.setattr(sources_tar, "_made", lambda tar, nested: indexed.append(tar.name) or made(tar, nested))
    config = DataConfig(path=str(imagenet), image_size=32, format=format)
    found = open_test_source(config, CLASSES)
    assert found.classes == CLASSES and found.labels.tolist() == expected.labels.tolist()
    assert [found.name(index) for index in range(5)] == [expected.name(index) for index in range(5)]
    assert path.name not in indexed


def damaged(root, how):
    path = root / "ILSVRC2012_img_train.tar"
    whole = path.read_bytes()
    if how == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "a header overwritten":
        place = whole.index(b"n01443537_9.JPEG")
        path.write_bytes(whole[:place] + b"\xff" * 512 + whole[place + 512 :])
    elif how == "no tar":
        path.write_bytes(b"junk" * 500)
    elif how == "images in it":
        tar(path, TRAIN[CLASSES[0]])
    elif how == "a class of nothing":
        tar(path, [("n1.tar", class_tar(TRAIN[CLASSES[0]])), ("n2.tar", class_tar([("readme.txt", b"none")]))])
    elif how == "a class that is no tar":
        tar(path, [("n1.tar", class_tar(TRAIN[CLASSES[0]])), ("n2.tar", b"junk" * 500)])
    elif how == "empty":
        tar(path, [])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", r"is cut off or damaged|cannot be read as a tar"),
        ("a header overwritten", r"cannot be read as a tar \(at byte \d+\): no header where one must be"),
        ("no tar", r"img_train\.tar cannot be read as a tar \(at byte 0\)"),
        ("images in it", r"holds n01440764_10\.JPEG, expected one tar for each class, such as n01440764\.tar"),
        ("a class of nothing", r"no training image of 1 of its 2 classes \(n2\)"),
        ("a class that is no tar", r"cannot be read as a tar \(at byte [1-9]\d+\)"),
        ("empty", r"img_train\.tar has no images \(\.jpg"),
    ],
)
def test_a_tar_that_does_not_fit_is_named(imagenet, how, message):
    damaged(imagenet, how)
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(path=str(imagenet), image_size=32), "train")


def test_a_tar_cut_off_after_it_was_indexed_gives_unreadable_images(imagenet):
    train, _ = open_both(imagenet)
    path = imagenet / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OSError, match=r"img_train\.tar ends within ILSVRC2012_img_train\.tar/n01440764/"):
        train.read(0)


def test_the_format_named_without_the_tar(tmp_path):
    for split in ("train", "test"):
        with pytest.raises(DataError, match=r"no training tar in .*; looked for ILSVRC2012_img_train\.tar or"):
            open_source(DataConfig(path=str(tmp_path), format="tar", image_size=32), split)
