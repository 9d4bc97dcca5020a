"""The embedded digits: written once, the same everywhere, safe among processes."""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from laasp_ray.config import DataConfig
from laasp_ray.data.sources import digits
from laasp_ray.data.sources.registry import open_source
from laasp_ray.errors import DataError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    digits.ensure_digits(root)
    return root


@pytest.fixture
def splits(cache, monkeypatch):
    monkeypatch.setenv("LAASP_RAY_CACHE", str(cache))
    return [open_source(DataConfig(image_size=64), split) for split in ("train", "test")]


def test_all_1797_digits_split_by_class(splits):
    train, test = splits
    assert len(train) + len(test) == 1797 and train.classes == test.classes == tuple("0123456789")
    # UCI's counts by digit; every fifth goes into the test split.
    counts = np.array([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    assert np.bincount(test.labels).tolist() == (counts // 5).tolist()
    assert np.bincount(train.labels).tolist() == (counts - counts // 5).tolist()


def test_no_digit_is_in_both_splits(splits):
    numbers = [{source.name(i).split("_")[1] for i in range(len(source))} for source in splits]
    assert not numbers[0] & numbers[1] and len(numbers[0] | numbers[1]) == 1797


def test_the_embedded_digits_are_scikit_learns():
    original = load_digits()
    images, labels = digits.read_digits()
    assert images.dtype == labels.dtype == np.uint8
    assert np.array_equal(images, original.images) and np.array_equal(labels, original.target)


def test_the_files_are_the_digits(splits):
    original = load_digits()
    train = splits[0]
    for index in (0, 700, 1400):
        number = int(train.name(index).split("_")[1].removesuffix(".JPEG"))
        assert original.target[number] == train.labels[index]
        with Image.open(io.BytesIO(train.read(index))) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
            small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), float)
        assert np.corrcoef(small.ravel(), original.images[number].ravel())[0, 1] > 0.98


def test_a_second_call_writes_nothing(cache):
    before = sorted((file, file.stat().st_mtime_ns) for file in cache.rglob("*"))
    assert digits.ensure_digits(cache) == cache / digits.FOLDER
    assert sorted((file, file.stat().st_mtime_ns) for file in cache.rglob("*")) == before


def test_callers_at_once_agree_and_leave_nothing_behind(tmp_path):
    # Threads stand for processes here: what keeps them apart is the name of the folder aside and the move of it.
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(digits.ensure_digits, [tmp_path] * 3)) == {tmp_path / digits.FOLDER}
    assert [entry.name for entry in tmp_path.iterdir()] == [digits.FOLDER]
    assert len(list(tmp_path.rglob("*.JPEG"))) == 1797


def test_losing_the_race_keeps_the_winners_folder(tmp_path, monkeypatch):
    def write(folder):
        (folder / "train").mkdir(parents=True)
        (tmp_path / digits.FOLDER / "train").mkdir(parents=True)
        (tmp_path / digits.FOLDER / "train" / "winner").touch()

    monkeypatch.setattr(digits, "_write", write)
    digits.ensure_digits(tmp_path)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["winner"]
    assert [entry.name for entry in tmp_path.iterdir()] == [digits.FOLDER]


def test_writing_again_gives_the_same_bytes(cache, tmp_path):
    def digest(root):
        every = hashlib.sha256()
        for file in sorted((root / digits.FOLDER).rglob("*.JPEG")):
            every.update(file.read_bytes())
        return every.hexdigest()

    digits.ensure_digits(tmp_path)
    assert digest(tmp_path) == digest(cache)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LAASP_RAY_CACHE", str(tmp_path / "own"))
    assert digits.default_cache() == tmp_path / "own"
    monkeypatch.delenv("LAASP_RAY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert digits.default_cache() == tmp_path / "xdg" / "laasp_ray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert digits.default_cache() == tmp_path / ".cache" / "laasp_ray"


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written into .*file.*set LAASP_RAY_CACHE"):
        digits.ensure_digits(tmp_path / "file")
