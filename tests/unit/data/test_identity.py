"""Which images a run began with: what is noticed when they change, and whose place is kept."""

import json

import numpy as np
import pytest
from PIL import Image

from laasp_ray.config import DataConfig
from laasp_ray.data.sources.identity import check_identity, identify
from laasp_ray.data.sources.places import find_places, with_places
from laasp_ray.data.sources.registry import open_source
from laasp_ray.errors import DataError
from laasp_ray.records import Place


@pytest.fixture
def root(tmp_path):
    """Three classes of four images each in train, two each in val; their content depends on class and number."""
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate("abc"):
            for number in range(count):
                path = tmp_path / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((4, 4, 3), 10 * label + number, np.uint8)).save(path)
    return tmp_path


def opened(root, split="train"):
    return open_source(DataConfig(path=str(root), image_size=4), split)


def known(root, split="train"):
    return json.loads(json.dumps(identify(opened(root, split))))


def test_an_identity_by_hand(root):
    identity = known(root)
    assert identity["images"] == 12
    assert [(name, count) for name, count, _ in identity["classes"]] == [("a", 4), ("b", 4), ("c", 4)]
    assert [index for index, _ in identity["sample"]] == [0, 4, 8]
    check_identity(identity, opened(root), "train", ())
    check_identity(known(root, "test"), opened(root, "test"), "test", ())


def remove(root):
    (root / "train" / "b" / "1.png").unlink()


def add(root):
    (root / "train" / "b" / "9.png").write_bytes((root / "train" / "b" / "3.png").read_bytes())


def rename(root):
    (root / "train" / "b" / "2.png").rename(root / "train" / "b" / "22.png")


def swap(root):
    for old, new in (("a", "aside"), ("b", "a"), ("aside", "b")):
        (root / "train" / old).rename(root / "train" / new)


def add_class(root):
    (root / "train" / "d").mkdir()
    (root / "train" / "d" / "0.png").write_bytes((root / "train" / "b" / "3.png").read_bytes())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove, "(11 now, 12 at its start): the class b has 3 images instead of 4"),
        (add, "(13 now, 12 at its start): the class b has 5 images instead of 4"),
        (rename, "(12 now, 12 at its start): the class b has images of other names, now beginning with train/b/0.png"),
        (swap, "(12 now, 12 at its start): train/a/0.png has another content"),
        (add_class, "(13 now, 12 at its start): the class d is new"),
    ],
    ids=["removed", "added", "renamed", "folders swapped", "class added"],
)
def test_a_change_is_refused_with_the_counts_and_an_example(root, change, said):
    before = known(root)
    change(root)
    with pytest.raises(DataError) as error:
        check_identity(before, opened(root), "train", ())
    assert str(error.value) == (
        f"the training images are not those that the run began with {said}; restore them, or start a new run with "
        "another --name"
    )


def test_a_test_image_that_is_gone_is_refused(root):
    before = known(root, "test")
    (root / "val" / "c" / "0.png").unlink()
    with pytest.raises(DataError, match=r"the test images are not .*5 now, 6 at .*class c has 1 images instead of 2"):
        check_identity(before, opened(root, "test"), "test", ())


def test_of_an_older_run_only_the_number_is_known(root):
    check_identity({"images": 12}, opened(root), "train", ())
    with pytest.raises(DataError, match=r"12 now, 13 at its start\): images were added or removed"):
        check_identity({"images": 13}, opened(root), "train", ())


def test_a_broken_image_may_be_repaired(root):
    whole = (root / "train" / "b" / "0.png").read_bytes()
    (root / "train" / "b" / "0.png").write_bytes(b"junk")
    before = known(root)
    assert [index for index, _ in before["sample"]] == [0, 8]
    (root / "train" / "b" / "0.png").write_bytes(whole)
    check_identity(before, opened(root), "train", ())


def test_a_folder_may_move_and_be_called_otherwise(root):
    before = known(root, "test")
    (root / "val").rename(root / "test")
    moved = root.rename(root.with_name("moved"))
    check_identity(before, opened(moved, "test"), "test", ())


def test_images_that_were_left_out_and_are_gone_keep_their_places(root):
    whole = opened(root)
    names = ["train/a/0.png", "train/b/1.png", "train/b/2.png", "train/c/3.png", "val/a/1.png"]
    sources = {"train": whole, "test": opened(root, "test")}
    places = find_places([*names, "nobody"], sources)
    assert places["train/b/1.png"] == Place(name="train/b/1.png", split="train", index=5, label=1)
    assert places["val/a/1.png"] == Place(name="val/a/1.png", split="test", index=1, label=0)
    assert list(places) == names
    before, contents = identify(whole), [whole.read(index) for index in range(12)]
    for name in ("train/a/0.png", "train/b/1.png", "train/c/3.png"):  # train/b/2.png was left out and is there still
        (root / name).unlink()
    kept = with_places(opened(root), "train", places.values())
    assert len(kept) == 12 and kept.labels.tolist() == whole.labels.tolist() and kept.classes == whole.classes
    assert [kept.name(index) for index in range(12)] == [whole.name(index) for index in range(12)]
    for index in range(12):
        if index in (0, 5, 11):
            with pytest.raises(FileNotFoundError, match="was left out, and is not there any more"):
                kept.read(index)
        else:
            assert kept.read(index) == contents[index]
    check_identity(before, kept, "train", names)
    (root / "train" / "b" / "3.png").unlink()
    with pytest.raises(DataError, match=r"11 now, 12 at its start\): the class b has 3 images instead of 4"):
        check_identity(before, with_places(opened(root), "train", places.values()), "train", names)


def test_nothing_is_put_around_a_source_that_is_whole(root):
    source = opened(root)
    places = find_places(["train/a/0.png"], {"train": source})
    assert with_places(source, "train", places.values()) is source
