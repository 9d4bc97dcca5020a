"""Shards made from other sources: that they give the same images, what is left out, and going on after a stop."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from image_folders import COUNT, encoded, picture
from PIL import Image

from laasp_ray.config import DataConfig
from laasp_ray.data.loaders.decoding import checked_size
from laasp_ray.data.shards import preparation
from laasp_ray.data.shards.files import locked, whole_file
from laasp_ray.data.shards.listing import make_lists, verify
from laasp_ray.data.shards.preparation import ShardSize, check_images, prepare
from laasp_ray.data.shards.samples import key_of, sample, suffix_of
from laasp_ray.data.shards.tasks import Images, ShardTask, VerifyTask, in_this_process
from laasp_ray.data.sources.registry import open_source
from laasp_ray.data.sources.shard_list import read_shard_list
from laasp_ray.errors import DataError
from laasp_ray.report.bars import LineBars

EIGHT = ShardSize(samples=8)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LAASP_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out") / "shards"


class Counted:
    """Bars that keep what they were told: description -> (total, counted)."""

    def __init__(self):
        self.lines = io.StringIO()
        self.bars = LineBars(self.lines, lambda: 0.0)

    def bar(self, *given):
        return self.bars.bar(*given)


def made(root, folder, split="train", size=EIGHT, seed=0, spread=in_this_process):
    images, source = Images.seen(DataConfig(path=str(root), image_size=4), split)
    return prepare(images, source, folder, size, seed, spread, Counted())


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_shards_give_what_their_source_gives_image_by_image(folder, out):
    for split, name in (("train", "train"), ("test", "val")):
        made(folder, out / name, split)
        config = DataConfig(path=str(out), image_size=4)
        ours, theirs = open_source(config, split), open_source(DataConfig(path=str(folder), image_size=4), split)
        assert ours.classes == theirs.classes == ("a", "b")
        assert ours.labels.tolist() == theirs.labels.tolist() == [0] * 12 + [1] * 12
        assert [ours.read(index) for index in range(COUNT)] == [theirs.read(index) for index in range(COUNT)]


def test_the_shards_by_hand(folder, out):
    done = made(folder, out / "train", size=ShardSize(samples=10))
    assert [shard.samples for shard in done.listed.shards] == [8, 8, 8]  # 24 in the fewest shards of at most 10
    assert (done.bad, done.kept, done.existed) == ((), 0, False)
    files = contents(out / "train")
    assert list(files) == ["index.json", "left_out.txt", *(f"train-00000{n}.tar" for n in range(3))]
    for shard in done.listed.shards:
        assert shard.sha256 == hashlib.sha256(files[shard.name]).hexdigest() and shard.bytes == len(files[shard.name])
    with tarfile.open(out / "train" / "train-000000.tar") as archive:
        names, first = archive.getnames(), archive.getmembers()[0]
        assert archive.format == tarfile.USTAR_FORMAT or first.pax_headers == {}
    assert [name.rpartition(".")[2] for name in names] == ["jpg", "cls"] * 8
    assert [name.partition(".")[0] for name in names[::2]] == [name.partition(".")[0] for name in names[1::2]]
    assert names[::2] != sorted(names[::2])
    assert (first.mtime, first.uid, first.gid, first.uname, first.mode) == (0, 0, 0, "", 0o644)


def test_the_order_is_the_seeds(folder, out):
    one, again, other = (made(folder, out / name, seed=seed).listed for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert [shard.sha256 for shard in one.shards] == [shard.sha256 for shard in again.shards]
    assert all(mine.sha256 != theirs.sha256 for mine, theirs in zip(one.shards, other.shards, strict=True))


def test_a_shards_samples_by_size():
    assert ShardSize(samples=7).samples_of(1e9) == 7
    assert ShardSize(megabytes=100).samples_of(110_000) == 909
    assert ShardSize(megabytes=1).samples_of(5e6) == 1
    assert [ShardSize().samples_of(mean) for mean in (1_000, 125_000, 5e6)] == [10_000, 4_000, 1_000]


@pytest.mark.parametrize(
    ("index", "count", "name", "key"),
    [
        (7, 24, "train/a/n01_7.JPEG", "00000007-n01_7"),
        (7, 10**9, "train.parquet#17", "0000000007-train_parquet_17"),
        (0, 1, "val/b/a b.c.png", "00000000-a_b_c"),
        (1, 2, f"x/{'ü' * 9}{'k' * 99}.jpg", f"00000001-_{'k' * 59}"),
    ],
)
def test_keys(index, count, name, key):
    assert key_of(index, count, name) == key


@pytest.mark.parametrize(
    ("format", "name", "suffix"),
    [("JPEG", "a.png", ".jpg"), ("PNG", "a.JPEG", ".png"), ("BMP", "a#3", ".bmp"), ("GIF", "a.JPEG", ".jpeg")],
)
def test_the_suffix_is_that_of_the_content(format, name, suffix):
    assert suffix_of(encoded(picture(1), format), name) == suffix


def test_a_sample_by_hand():
    data = encoded(Image.new("RGB", (1, 1)), "BMP")
    written = sample(3, 4, "x.bmp", data, 12)
    assert len(written) == 4 * 512 and written[512 : 512 + len(data)] == data
    assert written[:14] == b"00000003-x.bmp" and written[1024:1038] == b"00000003-x.cls"
    assert written[1536:1539] == b"12\0" and written[257:265] == b"ustar\x0000"


BROKEN = {"train/a/004.JPEG": b"", "train/b/005.JPEG": b"no image at all"}


@pytest.fixture
def broken(folder):
    """The pictures, three of them broken: one lacks the middle of its file, which only decoding it in whole shows."""
    for name, content in BROKEN.items():
        (folder / name).write_bytes(content)
    whole = encoded(picture(7), "PNG")
    (folder / "train" / "b" / "007.JPEG").write_bytes(whole[: len(whole) // 2] + whole[-64:])
    return folder


NAMES = ["train/a/004.JPEG", "train/b/005.JPEG", "train/b/007.JPEG"]


def test_bad_images_are_listed_with_their_reason_and_left_out(broken, out):
    done = made(broken, out / "train")
    assert [image.name for image in done.bad] == NAMES
    lines = (out / "train" / "left_out.txt").read_text().splitlines()
    assert [line.partition("\t")[0] for line in lines] == NAMES
    assert lines[0] == "train/a/004.JPEG\tthe file is empty"
    assert lines[1] == "train/b/005.JPEG\tnot an image that can be read (UnidentifiedImageError)"
    assert lines[2].startswith("train/b/007.JPEG\t") and len(lines) == 3
    assert checked_size((broken / NAMES[2]).read_bytes()) == (54, 44 + 5 * (7 % 7))  # its ends do not show it
    assert done.listed.samples == COUNT - 3
    source = open_source(DataConfig(path=str(out), format="webdataset", image_size=4), "train")
    theirs = open_source(DataConfig(path=str(broken), image_size=4), "train")
    good = [index for index in range(COUNT) if theirs.name(index) not in NAMES]
    assert [source.read(number) for number in range(COUNT - 3)] == [theirs.read(index) for index in good]


def test_a_check_alone_lists_the_same_and_writes_nothing(broken, tmp_path_factory):
    before = sorted(broken.rglob("*"))
    images, source = Images.seen(DataConfig(path=str(broken), image_size=4), "train")
    bars = Counted()
    assert [image.name for image in check_images(images, source, in_this_process, bars)] == NAMES
    assert bars.lines.getvalue() == "checking the train images: 24 of 24 images, 0 s\n"
    assert sorted(broken.rglob("*")) == before


def test_a_class_without_an_image_that_can_be_read(folder, out):
    for path in (folder / "train" / "b").iterdir():
        path.write_bytes(b"junk")
    with pytest.raises(
        DataError, match=r"no train image can be read of 1 of 2 classes \(b\), see .*left_out\.txt: repair"
    ):
        made(folder, out / "train")
    assert not (out / "train" / "index.json").exists()


def test_a_shard_of_bad_images_only_is_none(folder, out):
    for path in sorted((folder / "train" / "a").iterdir())[1:]:
        path.write_bytes(b"junk")
    done = made(folder, out / "train", size=ShardSize(samples=1))
    assert done.listed.samples == 13 and len(done.listed.shards) == 13
    assert len(list((out / "train").glob("*.tar"))) == 13
    assert len(open_source(DataConfig(path=str(out), image_size=4), "train")) == 13


class StoppedError(Exception):
    pass


def stopped_after(count):
    """Does so many shards and ends in the middle of the next."""

    def spread(tasks):
        for number, task in enumerate(tasks):
            for step in task.steps():
                yield step
                if number == count and isinstance(task, ShardTask):
                    raise StoppedError

    return spread


def only_making(names):
    """Keeps the names of the shards that are made."""

    def spread(tasks):
        for task in tasks:
            if isinstance(task, ShardTask):
                names.append(task.path.name)
            yield from task.steps()

    return spread


@pytest.fixture
def whole(folder, out):
    """The files of shards that were made in one go."""
    made(folder, out / "whole" / "train")
    return contents(out / "whole" / "train")


def test_it_goes_on_where_it_was_stopped(folder, out, whole):
    with pytest.raises(StoppedError):
        made(folder, out / "train", spread=stopped_after(2))
    assert not (out / "train" / "index.json").exists()
    names = []
    done = made(folder, out / "train", spread=only_making(names))
    assert names == ["train-000002.tar"] and done.kept == 2
    assert contents(out / "train") == whole and not (out / "train" / ".preparing").exists()
    again = made(folder, out / "train", spread=only_making(names))
    assert again.existed and names == ["train-000002.tar"] and again.listed == done.listed


def cut(path):
    path.write_bytes(path.read_bytes()[:-512])


def flip(path):
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, os.unlink], ids=["cut off", "a bit flipped", "gone"])
def test_a_finished_shard_that_is_damaged_is_made_anew(folder, out, whole, damage, caplog):
    with pytest.raises(StoppedError):
        made(folder, out / "train", spread=stopped_after(2))
    damage(out / "train" / "train-000001.tar")
    names = []
    made(folder, out / "train", spread=only_making(names))
    assert names == ["train-000001.tar", "train-000002.tar"] and contents(out / "train") == whole
    assert "train-000001.tar is made anew: " in caplog.text


def test_a_record_that_is_damaged_or_of_no_shard(folder, out, whole, caplog):
    with pytest.raises(StoppedError):
        made(folder, out / "train", spread=stopped_after(2))
    (out / "train" / ".preparing" / "train-000000.json").write_text('{"shard": {}}')
    (out / "train" / ".preparing" / "train-000001.json").unlink()
    names = []
    made(folder, out / "train", spread=only_making(names))
    assert len(names) == 3 and contents(out / "train") == whole and "its shard is made anew" in caplog.text


KILLED = """
import sys
from laasp_ray.cli.prepare_data import prepare_data
sys.exit(prepare_data(sys.argv[1:]))
"""


@pytest.mark.parametrize("finished", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_kill_9_while_shards_are_made(folder, out, whole, finished):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(folder), "--out", str(out), "--split", "train", "--samples", "8"]
    process = subprocess.Popen([*command, "--no-ray"], env=environment, stderr=subprocess.DEVNULL)
    under_way = out / "train" / ".preparing"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        records = len(list(under_way.glob("train-*.json"))) if under_way.is_dir() else -1
        if records >= finished:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    made(folder, out / "train")
    assert contents(out / "train") == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"size": ShardSize(samples=12)}, "samples_per_shard was 8, is 12"),
    ],
)
@pytest.mark.parametrize("is_finished", [False, True])
def test_other_options_are_refused(folder, out, change, said, is_finished):
    if is_finished:
        made(folder, out / "train")
    else:
        with pytest.raises(StoppedError):
            made(folder, out / "train", spread=stopped_after(1))
    before = contents(out / "train")
    with pytest.raises(DataError) as error:
        made(folder, out / "train", **change)
    assert str(error.value) == (
        f"{out}/train has shards of another source or with other options ({said}): give the same ones to go on, or "
        "name another folder with --out"
    )
    assert contents(out / "train") == before


def test_another_source_is_refused(folder, out):
    made(folder, out / "train")
    (folder / "train" / "a" / "000.JPEG").write_bytes(encoded(picture(99)))
    with pytest.raises(DataError, match=r"with other options \(contents was [0-9a-f]{16}, is [0-9a-f]{16}\)"):
        made(folder, out / "train")


def test_a_folder_with_other_files_is_left_alone(folder, out):
    with pytest.raises(DataError, match=f"{folder}/train has other files already: name another folder with --out"):
        made(folder, folder / "train")


def test_two_at_once_are_refused(folder, out):
    with pytest.raises(StoppedError):
        made(folder, out / "train", spread=stopped_after(1))
    with locked(out / "train" / ".preparing" / "lock") as is_ours:
        assert is_ours
        with pytest.raises(DataError, match=r"another process makes shards in .*/train now: let it finish, or stop it"):
            made(folder, out / "train")


def test_a_disk_that_is_too_small(folder, out, monkeypatch):
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match=r"the shards in .* need about 0\.0 GB more, 0\.0 GB are free there: make room"):
        made(folder, out / "train")


def test_a_folder_that_cannot_be_written(folder, out):
    out.mkdir()
    (out / "train").write_text("a file")
    with pytest.raises(DataError, match=r"shards cannot be written into .*/train: .*; see to its room and permissions"):
        made(folder, out / "train")


def test_a_worker_that_sees_other_images(folder, out):
    images, _ = Images.seen(DataConfig(path=str(folder), image_size=4), "train")
    (folder / "train" / "a" / "extra.JPEG").write_bytes(encoded(picture(1)))
    with pytest.raises(DataError, match=r"a worker sees other train images in .* than the driver \(25 there\)"):
        images.open()


def test_a_shard_that_the_driver_does_not_see(folder, out):
    def elsewhere(tasks):
        for task in tasks:
            steps = list(task.steps())
            task.path.unlink()
            yield from steps

    with pytest.raises(DataError, match="is not there for the driver: --out must be a folder that all nodes share"):
        made(folder, out / "train", spread=elsewhere)


def test_a_file_that_is_not_finished_does_not_take_its_name(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(StoppedError), whole_file(tmp_path / "a") as file:
        file.write(b"new")
        raise StoppedError
    assert contents(tmp_path) == {"a": b"old"}
    with whole_file(tmp_path / "a") as file:
        file.write(b"new")
        assert (file.bytes, file.sha256) == (3, hashlib.sha256(b"new").hexdigest())
    assert contents(tmp_path) == {"a": b"new"}


def verified(out):
    return {found.folder.name: found.faults for found in verify(out, in_this_process, Counted())}


def test_verification(folder, out):
    made(folder, out / "train")
    made(folder, out / "val", "test")
    assert verified(out) == {"train": (), "val": ()}
    flip(out / "train" / "train-000001.tar")
    cut(out / "val" / "val-000000.tar")
    (out / "val" / "val-000002.tar").unlink()
    sizes = [shard.bytes for shard in read_shard_list(out / "val").shards]
    found = verified(out)
    assert [fault.name for fault in found["train"]] == ["train-000001.tar"]
    assert found["train"][0].fault.startswith("its sha256 is ")
    assert [(fault.name, fault.fault) for fault in found["val"]] == [
        ("val-000000.tar", f"it has {sizes[0] - 512:,} bytes instead of {sizes[0]:,}"),
        ("val-000002.tar", "No such file or directory"),
    ]


def test_what_a_verification_counts_is_all_bytes_even_of_shards_that_are_gone(folder, out):
    listed = made(folder, out / "train").listed
    cut(out / "train" / "train-000000.tar")
    (out / "train" / "train-000001.tar").unlink()
    for shard in listed.shards:
        steps = list(VerifyTask(folder=out / "train", shard=shard).steps())
        assert sum(steps[:-1]) == shard.bytes


def test_a_list_for_shards_made_elsewhere(folder, out):
    made(folder, out / "train")
    made(folder, out / "val", "test")
    known = read_shard_list(out / "train")
    test_list = (out / "val" / "index.json").read_bytes()
    (out / "train" / "index.json").unlink()
    lists = [found.listed for found in make_lists(out, in_this_process, Counted())]
    assert lists[0].shards == known.shards and lists[0].classes == ()
    assert (out / "val" / "index.json").read_bytes() == test_list
    assert open_source(DataConfig(path=str(out), image_size=4), "train").classes == ("0", "1")


def test_a_folder_without_shards(tmp_path):
    with pytest.raises(
        DataError, match=r"no shards in .*; looked for .*/train/\*\.tar, .* name the folder above those"
    ):
        list(verify(tmp_path, in_this_process, Counted()))


def test_compressed_shards_get_no_list(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match="train has compressed tars only: uncompress them"):
        list(make_lists(tmp_path, in_this_process, Counted()))


def test_the_plan_is_in_the_list(folder, out):
    made(folder, out / "train", seed=3)
    plan = json.loads((out / "train" / "index.json").read_text())["made_from"]
    assert (plan["seed"], plan["samples_per_shard"], plan["images"]) == (3, 8, COUNT)
    assert np.array(list(plan)).tolist() == ["images", "names", "contents", "seed", "samples_per_shard"]
