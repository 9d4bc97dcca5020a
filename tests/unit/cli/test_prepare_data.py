"""`jobs/prepare_data.py` in one process: what it prints, writes and refuses."""

import pytest
from helpers import write_pictures

from laasp_ray.cli.prepare_data import prepare_data


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LAASP_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def images(tmp_path):
    """24 training and 7 test pictures of three classes."""
    return write_pictures(tmp_path / "images", side=16, train=24, test=7)


def ran(capsys, *given):
    status = prepare_data([*map(str, given), "--no-ray"])
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err.splitlines()


def first_training_image(images):
    return sorted(path for path in (images / "train").rglob("*") if path.is_file())[0]


def test_shards_of_both_splits(images, tmp_path, capsys):
    out = tmp_path / "shards"
    status, lines, errors = ran(capsys, images, "--out", out, "--samples", 10)
    assert status == 0 and lines[-1] == f"shards: {out}"
    assert lines[0].split() == ["split", "shards", "samples", "MB", "left", "out", "kept"]
    assert [line.split()[:3] for line in lines[2:4]] == [["train", "3", "24"], ["test", "1", "7"]]
    assert errors[-1] == "making test shards: 7 of 7 images, 0 s"
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"]
    status, lines, _ = ran(capsys, images, "--out", out, "--samples", 10)
    assert status == 0 and lines[0] == f"{out}/train is finished: nothing to do (--verify reads it through)"
    assert ran(capsys, out, "--verify")[:2] == (
        0,
        [
            f"{out}/train: 3 shards, 24 samples, 3 are as listed",
            f"{out}/val: 1 shards, 7 samples, 1 are as listed",
        ],
    )


def test_one_split_alone(images, tmp_path, capsys):
    assert ran(capsys, images, "--out", tmp_path / "shards", "--split", "test")[0] == 0
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["val"]


def test_a_bad_image_is_printed_and_left_out(images, tmp_path, capsys):
    bad = first_training_image(images)
    bad.write_bytes(b"")
    name = f"train/{bad.relative_to(images / 'train')}"
    status, lines, _ = ran(capsys, images, "--out", tmp_path / "shards")
    assert status == 0 and lines[0] == f"bad: {name}: the file is empty"
    assert lines[3].split()[2] == "23" and lines[3].split()[-2:] == ["1", "0"]
    assert (tmp_path / "shards" / "train" / "left_out.txt").read_text() == f"{name}\tthe file is empty\n"


def test_a_check_alone(images, tmp_path, capsys):
    assert ran(capsys, images, "--check-only")[:2] == (0, ["all 31 images can be decoded"])
    bad = first_training_image(images)
    bad.write_bytes(b"")
    name = f"train/{bad.relative_to(images / 'train')}"
    status, lines, errors = ran(capsys, images, "--check-only", "--bad-list", tmp_path / "bad.txt")
    assert (status, lines) == (2, [f"bad: {name}: the file is empty"])
    assert errors[-1] == "error: 1 of 31 images cannot be read or decoded: repair or remove them"
    assert (tmp_path / "bad.txt").read_text() == f"{name}\tthe file is empty\n"


def test_only_the_first_of_many_bad_images_are_printed(images, capsys):
    for path in (images / "train").rglob("*"):
        if path.is_file():
            path.write_bytes(b"junk")
    _, lines, _ = ran(capsys, images, "--check-only")
    assert len(lines) == 21 and lines[-1] == "and 4 more (--bad-list FILE writes all)"


def test_shards_that_are_damaged(images, tmp_path, capsys):
    out = tmp_path / "shards"
    ran(capsys, images, "--out", out)
    path = out / "train" / "train-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    status, lines, errors = ran(capsys, out, "--verify")
    assert status == 2 and lines[0].startswith(f"bad: {path}: its sha256 is ")
    assert lines[1] == f"{out}/train: 1 shards, 24 samples, 0 are as listed"
    assert errors[-1] == f"error: 1 shards in {out} are not as listed: copy them anew, or make them anew"


def test_a_list_is_made_for_shards_that_have_none(images, tmp_path, capsys):
    out = tmp_path / "shards"
    ran(capsys, images, "--out", out)
    (out / "val" / "index.json").unlink()
    assert ran(capsys, out, "--index")[1][1] == f"{out}/val: 1 shards, 7 samples, listed in index.json"
    assert ran(capsys, out, "--verify")[0] == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["IMAGES", "--out", "s3://b/shards"],
            "--out s3://b/shards: shards are written to a folder: name one, then copy",
        ),
        (["s3://b/x", "--check-only"], "s3://b/x is no folder: copy the data set to a disk that all nodes see"),
        (["--verify"], "--verify needs the folder of the shards: name it first"),
        (["--index"], "--index needs the folder of the shards: name it first"),
        (["IMAGES", "--out", "x", "--shard-mb", "0"], "--shard-mb is 0, must be more than 0"),
        (
            ["IMAGES", "--out", "x", "--bad-list", "y"],
            "--bad-list goes with --check-only; with --out the list is in left_",
        ),
        (["IMAGES", "--check-only", "--bad-list", "/no/such/y"], "--bad-list /no/such/y: there is no folder /no/such"),
        (["/no/such", "--check-only"], "no data set at /no/such: data.path must be a folder"),
    ],
)
def test_what_does_not_fit_is_refused(images, capsys, given, said):
    status, lines, errors = ran(capsys, *(images if text == "IMAGES" else text for text in given))
    assert (status, lines) == (2, []) and errors[0].startswith(f"error: {said}")


@pytest.mark.parametrize("given", [[], ["--out", "x", "--verify"], ["--out", "x", "--samples", "0"]])
def test_what_argparse_refuses(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare_data(given)
    assert "usage: prepare_data.py" in capsys.readouterr().err
