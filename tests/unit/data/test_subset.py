"""The calibration set: balanced, frozen, and the same for the same seed."""

import hashlib
import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from laasp_ray.config import DataConfig
from laasp_ray.data.calibration import balanced_choice, class_quotas, draw_calibration_images
from laasp_ray.data.ordering import derive_seed, windows
from laasp_ray.data.sources.registry import open_source
from laasp_ray.errors import DataError

PER_CLASS = {"a": 30, "b": 30, "c": 6}


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (66, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def config(tmp_path, pixels):
    numbers = iter(range(66))
    for name, count in PER_CLASS.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(pixels[next(numbers)]).save(tmp_path / "train" / name / f"{k:02d}.png")
    return DataConfig(path=str(tmp_path), image_size=32, eval_resize=0, train_transform="pad_crop")


@pytest.mark.parametrize(
    ("counts", "images", "quotas"),
    [
        ([5, 5, 5], 6, [2, 2, 2]),
        ([10, 2, 10], 12, [5, 2, 5]),
        ([10, 2, 3, 10], 100, [10, 2, 3, 10]),
        ([1, 0, 1], 2, [1, 0, 1]),
        ([4, 1, 9], 13, [4, 1, 8]),
    ],
)
def test_quotas_by_hand(counts, images, quotas):
    assert class_quotas(np.array(counts), images, key=1).tolist() == quotas


def test_what_does_not_divide_goes_to_classes_by_lot():
    drawn = [class_quotas(np.full(10, 50), 13, key=key) for key in range(300)]
    assert all(sorted(quotas) == [1] * 7 + [2] * 3 for quotas in drawn)
    assert min(np.sum(drawn, axis=0) - 300) > 60 and max(np.sum(drawn, axis=0) - 300) < 130  # 90 expected


def test_a_choice_has_no_image_twice_and_mixes_the_classes():
    labels = np.repeat(np.arange(4), 250)
    chosen = balanced_choice(labels, 400, key=5)
    assert len(set(chosen.tolist())) == 400
    assert np.bincount(labels[chosen]).tolist() == [100] * 4
    assert all(np.bincount(labels[chosen[k : k + 100]], minlength=4).min() > 10 for k in range(0, 400, 100))
    assert balanced_choice(labels, 400, key=6).tolist() != chosen.tolist()


def test_the_subset_is_the_training_augmentation_frozen(config, pixels):
    source = open_source(config, "train")
    calibration = draw_calibration_images(source, config, images=22, seed=3)
    assert np.bincount(calibration.labels.numpy()).tolist() == [8, 8, 6]
    assert calibration.labels.tolist() == source.labels[calibration.indices].tolist()
    assert calibration.images.dtype == torch.uint8 and calibration.images.shape == (22, 3, 32, 32)
    assert calibration.images.is_contiguous()
    drawn = windows(calibration.indices, [(32, 32)] * 22, config=config, seed=derive_seed(3, "subset"), epoch=0)
    for row, index in enumerate(calibration.indices):
        y, x = drawn.y[row] + 4, drawn.x[row] + 4
        expected = np.pad(pixels[index], ((4, 4), (4, 4), (0, 0)))[y : y + 32, x : x + 32]
        expected = expected[:, ::-1] if drawn.flip[row] else expected
        assert np.array_equal(calibration.images[row].permute(1, 2, 0).numpy(), expected)
    by_hand = hashlib.sha256(calibration.images.numpy().tobytes() + calibration.labels.numpy().tobytes()).hexdigest()
    assert calibration.digest == by_hand


def test_the_same_seed_gives_the_same_subset(config):
    source = open_source(config, "train")
    one, again, other = (draw_calibration_images(source, config, images=20, seed=seed) for seed in (0, 0, 1))
    assert one.digest == again.digest and one.indices.tolist() == again.indices.tolist()
    assert other.digest != one.digest


def test_all_there_are_if_fewer_and_the_log_says_so(config, caplog):
    with caplog.at_level(logging.INFO):
        calibration = draw_calibration_images(open_source(config, "train"), config, images=1000, seed=0)
    assert sorted(calibration.indices.tolist()) == list(range(66))
    assert "the calibration set has 66 images, 1000 were asked for" in caplog.text


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_an_unreadable_image_is_replaced_as_if_it_had_been_excluded(config, tmp_path, loader):
    import dataclasses

    config = dataclasses.replace(config, loader=loader)
    source = open_source(config, "train")
    whole = draw_calibration_images(source, config, images=22, seed=0)
    broken = int(whole.indices[whole.labels == 0][0])
    name = source.name(broken)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:300])
    told = []
    found = draw_calibration_images(source, config, images=22, seed=0, on_unreadable=told.append)
    assert told == [name]
    assert len(found.indices) == 22 and broken not in found.indices
    assert np.bincount(found.labels.numpy()).tolist() == [8, 8, 6]
    resumed = draw_calibration_images(source, config, images=22, seed=0, excluded=told)
    assert resumed.digest == found.digest


def test_nothing_left_is_an_error():
    with pytest.raises(DataError, match=r"no training image is left"):
        balanced_choice(np.array([0, 1]), 2, key=0, unavailable={0, 1})


def test_digits_give_rgb_jpegs_of_all_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("LAASP_RAY_CACHE", str(tmp_path))
    config = DataConfig(image_size=32, eval_resize=32)
    source = open_source(config, "train")
    calibration = draw_calibration_images(source, config, images=100, seed=0)
    assert np.bincount(calibration.labels.numpy()).tolist() == [10] * 10
    assert Image.open(io.BytesIO(source.read(0))).format == "JPEG"
