"""WebDataset shards as a data source: the samples by hand, and what shards that are not right get."""

import gzip
import hashlib
import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from laasp_ray.config import DataConfig
from laasp_ray.data.ordering import epoch_batches
from laasp_ray.data.sources import webdataset
from laasp_ray.data.sources.identity import check_identity, identify
from laasp_ray.data.sources.places import find_places, with_places
from laasp_ray.data.sources.registry import open_source, open_test_source
from laasp_ray.data.sources.shard_list import Shard, ShardList
from laasp_ray.errors import DataError

CLASSES = ("cat", "dog", "eel")
TRAIN = [("b", 1), ("d", 0), ("a", 2), ("c", 1), ("e", 0)]
"""Keys and labels in the order in which they are written: three samples in the first shard, two in the second."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAASP_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def content_of(key):
    return f"image {key}".encode() * (ord(key[-1]) % 7 + 1)


def pair(key, label, suffix="jpg"):
    return [(f"{key}.{suffix}", content_of(key)), (f"{key}.cls", str(label).encode())]


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def listed(folder, counts, classes=CLASSES):
    """Writes the list of the shards in `folder`, with so many samples each."""
    shards = []
    for path, count in zip(sorted(folder.glob("*.tar")), counts, strict=True):
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        shards.append(Shard(name=path.name, sha256=digest, samples=count, bytes=len(content)))
    (folder / "index.json").write_bytes(ShardList(shards=tuple(shards), classes=classes).to_json())


def write_split(folder, rows, cuts, classes=CLASSES):
    parts = np.split(np.arange(len(rows)), cuts)
    for number, part in enumerate(parts):
        members = [member for place in part for member in pair(*rows[place])]
        write_tar(folder / f"s-{number}.tar", members)
    listed(folder, list(map(len, parts)), classes)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "shards"
    write_split(root / "train", TRAIN, [3])
    write_split(root / "val", [("v", 2), ("u", 0)], [])
    return root


def opened(root, split="train", format="auto"):
    return open_source(DataConfig(path=str(root), format=format, image_size=4), split)


def test_samples_by_hand(root):
    train, test = opened(root), opened(root, "test")
    assert train.classes == test.classes == CLASSES
    assert train.labels.tolist() == [2, 1, 1, 0, 0] and train.labels.dtype == np.int64
    assert [train.read(index) for index in range(5)] == [content_of(key) for key in "abcde"]
    names = ["s-0.tar/a", "s-0.tar/b", "s-1.tar/c", "s-0.tar/d", "s-1.tar/e"]
    assert [train.name(index) for index in range(5)] == [f"train/{name}.jpg" for name in names]
    assert [test.name(index) for index in range(2)] == ["val/s-0.tar/u.jpg", "val/s-0.tar/v.jpg"]
    assert test.labels.tolist() == [0, 2]
    assert pickle.loads(pickle.dumps(train)).read(3) == content_of("d")


def test_the_order_of_training_does_not_depend_on_the_cuts(root, tmp_path):
    other = tmp_path / "other"
    write_split(other / "train", list(reversed(TRAIN)), [1, 2, 4])
    one, two = opened(root), opened(other)
    for epoch in range(3):
        for batch in epoch_batches(5, batch_size=2, seed=7, epoch=epoch):
            assert [one.read(int(index)) for index in batch] == [two.read(int(index)) for index in batch]
    assert one.labels.tolist() == two.labels.tolist()


def test_the_folder_test_is_the_test_split_too_and_the_layout_may_be_named(root):
    (root / "val").rename(root / "test")
    assert opened(root, "test", "webdataset").name(0) == "test/s-0.tar/u.jpg"


def test_the_test_shards_alone_are_enough_where_the_classes_are_known(root):
    (root / "train").rename(root.parent / "elsewhere")
    source = open_test_source(DataConfig(path=str(root), image_size=4), CLASSES)
    assert source.classes == CLASSES and len(source) == 2


def test_keys_are_cut_at_the_first_dot_and_may_have_folders(root, caplog):
    members = [
        ("./x.1/k.PNG", b"one"),
        ("x.1/k.cls", b"0\n"),
        ("x.1/k.json", b"{}"),
        ("k.jpeg", b"two"),
        ("k.cls", b"1"),
    ]
    write_tar(root / "train" / "s-1.tar", [*members, *pair("c", 2)])
    listed(root / "train", [3, 3])
    train = opened(root)
    names = [train.name(index).removeprefix("train/") for index in range(6)]
    assert names == [
        "s-0.tar/a.jpg",
        "s-0.tar/b.jpg",
        "s-1.tar/c.jpg",
        "s-0.tar/d.jpg",
        "s-1.tar/k.jpeg",
        "s-1.tar/x.1/k.PNG",
    ]
    assert (train.read(4), train.read(5), train.labels.tolist()) == (b"two", b"one", [2, 1, 2, 0, 1, 0])
    assert "1 files in " in caplog.text and "(1 .json): x.1/k.json" in caplog.text


def test_without_names_classes_are_numbers(root):
    listed(root / "train", [3, 2], classes=())
    assert opened(root).classes == ("0", "1", "2")


def test_shards_are_indexed_once_and_anew_when_one_changes(root, cache, monkeypatch):
    first = opened(root)
    assert len(list(cache.glob("*.npz"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "_made", lambda *_: pytest.fail("indexed again"))
        again = opened(root)
    assert [again.name(index) for index in range(5)] == [first.name(index) for index in range(5)]
    write_split(root / "train", [("z", 0), ("y", 1), ("x", 2), ("w", 0), ("v", 0)], [3])
    assert opened(root).name(0) == "train/s-1.tar/v.jpg"


def refused(root, split="train"):
    with pytest.raises(DataError) as error:
        opened(root, split)
    return str(error.value)


def test_a_list_that_is_missing(root):
    folder = root / "train"
    (folder / "index.json").unlink()
    assert refused(root) == (
        f"{folder} has shards and no index.json that lists them: make it with: "
        f"python jobs/prepare_data.py {root} --index"
    )


def test_no_shards_of_a_split(root):
    for path in (root / "val").iterdir():
        path.unlink()
    assert refused(root, "test") == (
        f"no test shards in {root}; looked for {root}/val/index.json or {root}/test/index.json and tars beside it"
    )


def test_a_shard_that_is_missing(root):
    (root / "train" / "s-1.tar").unlink()
    assert refused(root) == (f"{root}/train lacks 1 of the 2 shards in index.json (s-1.tar): copy them there")


def test_a_shard_of_another_size(root):
    path = root / "train" / "s-0.tar"
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    assert refused(root) == (
        f"1 of the 2 shards in {root}/train are not those in index.json (s-0.tar has 10,752 bytes instead of 10,240): "
        "copy them anew"
    )


def test_a_shard_that_is_not_listed(root):
    write_tar(root / "train" / "s-9.tar", pair("q", 0))
    assert refused(root).startswith(
        f"{root}/train has 1 shards that index.json does not list (s-9.tar): move them away"
    )


def test_a_shard_with_another_number_of_samples(root):
    listed(root / "train", [3, 1])
    assert f"{root}/train/s-1.tar has 2 samples, index.json says 1: copy it anew" in refused(root)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (
            [("k.jpg", b"i")],
            "s-1.tar: 1 of its samples have no label (KEY.cls), the first k: write every sample as a pair",
        ),
        (
            [("k.cls", b"0")],
            "s-1.tar: 1 of its samples have no image (KEY.jpg), the first k: write every sample as a pair",
        ),
        ([*pair("k", 3)], "s-1.tar: k has the label 3, of 3 classes (0 to 2): write the shards anew"),
        ([*pair("k", "dog")], "s-1.tar: k.cls holds b'dog', must be the number of a class in digits, from 0"),
        ([*pair("k", -1)], "s-1.tar: k.cls holds b'-1', must be the number of a class in digits, from 0"),
        ([*pair("k", "")], "s-1.tar: k.cls holds b'', must be the number of a class in digits, from 0"),
        ([*pair("k", "1" * 30)], f"s-1.tar: k.cls holds b'{'1' * 20}', must be the number of a class"),
        ([*pair("k", 0), ("k.png", b"i")], "s-1.tar has two images of the key k: every sample needs a key of its own"),
        ([*pair("k", 0), ("k.cls", b"0")], "s-1.tar has two labels of the key k: every sample needs a key of its own"),
    ],
)
def test_a_sample_that_is_not_right_is_named_with_its_shard(root, members, said):
    write_tar(root / "train" / "s-1.tar", members)
    listed(root / "train", [3, 1])
    assert f"{root}/train/{said}" in refused(root)


def test_a_label_beyond_all_sense_without_names_of_classes(root):
    write_tar(root / "train" / "s-1.tar", pair("k", 10**12))
    listed(root / "train", [3, 1], classes=())
    assert "k has the label 1000000000000, of 1000000 classes" in refused(root)


@pytest.mark.parametrize("name", ["s-1.tar", "s-1.tar.gz"])
def test_a_compressed_shard(root, name):
    path = root / "train" / "s-1.tar"
    content = gzip.compress(path.read_bytes())
    path.unlink()
    (root / "train" / name).write_bytes(content)
    shards = read_list(root)["shards"]
    shards[1] |= {"name": name, "bytes": len(content)}
    change_list(root, shards=shards)
    assert f"{root}/train/{name} is compressed (gzip), and images are read at their offsets: uncompress it" in refused(
        root
    )


def test_a_shard_that_is_cut_off_behind_a_right_size(root):
    path = root / "train" / "s-1.tar"
    path.write_bytes(path.read_bytes()[:700])
    listed(root / "train", [3, 2])
    assert f"{path} cannot be read as a tar (at byte 0): unexpected end of data; fetch it anew" in refused(root)


def read_list(root):
    return json.loads((root / "train" / "index.json").read_text())


def change_list(root, **changes):
    (root / "train" / "index.json").write_text(json.dumps(read_list(root) | changes))


GOOD = {"name": "s-0.tar", "sha256": "0" * 64, "samples": 5, "bytes": 10240}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": 2}, "schema_version is 2, this laasp_ray reads 1"),
        ({"shards": []}, "shards is [], must be a list of at least one shard"),
        (
            {"shards": [GOOD | {"name": "../s-0.tar"}]},
            "shards[0].name is '../s-0.tar', must be the name of a file beside",
        ),
        ({"shards": [GOOD | {"sha256": "0"}]}, "shards[0].sha256 is '0', must be 64 hexadecimal digits"),
        ({"shards": [GOOD | {"bytes": "9"}]}, "shards[0].bytes is '9', must be a whole number"),
        ({"shards": [GOOD | {"samples": True}]}, "shards[0].samples is True, must be a whole number"),
        ({"shards": [GOOD, GOOD]}, "it lists s-0.tar twice"),
        ({"samples": 6}, "samples is 6, its shards have 5 together"),
        ({"classes": ["a", "a"]}, "two of its classes have the same name"),
        ({"classes": "abc"}, "classes is 'abc', must be a list of names"),
    ],
)
def test_a_list_that_is_damaged(root, changes, said):
    change_list(root, **changes)
    assert f"{root}/train/index.json is damaged: {said}" in refused(root)
    assert refused(root).endswith(f"python jobs/prepare_data.py {root} --index")


def test_a_list_that_is_no_json(root):
    (root / "train" / "index.json").write_text("{")
    assert f"{root}/train/index.json is damaged: Expecting property name" in refused(root)


def test_a_list_of_shards_that_changed_is_told(root):
    before = json.loads(json.dumps(identify(opened(root))))
    check_identity(before, opened(root), "train", ())
    assert before["shard_list"] == digest_of_list(root)
    # The same keys and labels, and another image behind one of them that the sample of the identity does not have.
    members = [*pair("c", 1), ("e.jpg", b"another"), ("e.cls", b"0")]
    write_tar(root / "train" / "s-1.tar", members)
    listed(root / "train", [3, 2])
    now = digest_of_list(root)
    with pytest.raises(DataError) as error:
        check_identity(before, opened(root), "train", ())
    assert str(error.value) == (
        "the training images are not those that the run began with (5 now, 5 at its start): the list of shards has "
        f"changed (index.json's digest is {now[:16]} now, {before['shard_list'][:16]} at its start); restore them, or "
        "start a new run with another --name"
    )


def digest_of_list(root):
    return opened(root).shard_list_digest


def test_shards_written_anew_without_an_image_that_was_left_out_are_another_list(root):
    whole = opened(root)
    before = identify(whole)
    places = find_places(["train/s-1.tar/e.jpg"], {"train": whole})
    write_split(root / "train", TRAIN[:-1], [3])
    source = with_places(opened(root), "train", places.values())
    assert len(source) == 5
    with pytest.raises(DataError, match=r"\(5 now, 5 at its start\): the list of shards has changed"):
        check_identity(before, source, "train", ["train/s-1.tar/e.jpg"])


def test_a_run_begun_before_lists_were_kept_goes_on(root):
    before = {key: value for key, value in identify(opened(root)).items() if key != "shard_list"}
    check_identity(before, opened(root), "train", ())


def test_the_digest_of_a_list_by_hand():
    shard = Shard(name="a.tar", sha256="0" * 64, samples=2, bytes=1024)
    text = json.dumps([[["a.tar", "0" * 64, 2, 1024]], ["x", "y"]])
    assert ShardList(shards=(shard,), classes=("x", "y")).digest == hashlib.sha256(text.encode()).hexdigest()
