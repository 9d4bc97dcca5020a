"""Training and test images that do not mean the same classes by the same labels are refused before anything starts."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from helpers import small_run
from test_sources import png, put, write_parquet
from torch import nn

from laasp_ray.data.sources.base import check_classes, check_outputs, check_splits
from laasp_ray.errors import DataError
from laasp_ray.planning.dry_run import dry_run
from laasp_ray.run.preflight import prepare


class Split:
    def __init__(self, classes, most):
        self.classes, self.labels = tuple(classes), np.arange(most + 1, dtype=np.int64)


ANIMALS = ("cat", "dog", "eel")


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ((ANIMALS, 2), (ANIMALS, 0), None),
        (("012", 2), ("01", 1), None),  # classes without names: the test images need not have all
        (("01", 1), ("012", 2), r"test images have labels up to 2, the training images 2 classes \(0 to 1\)"),
        ((ANIMALS, 2), (("cat", "eel", "dog"), 2), r"label 1 is 'dog' in training and 'eel' in the test images"),
        ((ANIMALS, 2), (("cat", "dog", "owl"), 2), r"1 of 3 training classes are none .* \(eel\), 1 of 3 .* \(owl\)"),
        ((ANIMALS, 2), (("cat", "dog"), 1), r"1 of 3 training classes are none .* \(eel\), 0 of 2 .* \(none\)"),
        ((ANIMALS, 2), ((*ANIMALS, "owl"), 2), r"0 of 3 training .* \(none\), 1 of 4 .* \(owl\)"),
        ((ANIMALS, 2), ((*ANIMALS, "owl"), 3), r"test images have labels up to 3, the training images 3 classes"),
        ((ANIMALS, 2), ("0123", 3), r"test images have labels up to 3"),
    ],
)
def test_splits_are_compared_by_names_and_labels(train, test, message):
    if message is None:
        check_splits(Split(*train), Split(*test), "here")
        return
    with pytest.raises(DataError, match=f"the splits in here do not fit: .*{message}"):
        check_splits(Split(*train), Split(*test), "here")


@pytest.mark.parametrize(
    ("known", "found", "fits"),
    [
        (ANIMALS, ANIMALS, True),
        (None, ANIMALS, True),
        (tuple("012"), ANIMALS, True),
        (ANIMALS, ("cat", "eel", "dog"), False),
    ],
)
def test_images_of_an_evaluation_are_compared_with_the_runs_classes(known, found, fits):
    if fits:
        check_classes(Split(found, 2), known, "here")
        return
    with pytest.raises(DataError, match=r"images in here are not of the run's classes: label 1 is 'dog'"):
        check_classes(Split(found, 2), known, "here")


def test_names_on_one_side_alone_cannot_be_compared_and_that_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        check_splits(Split(ANIMALS, 2), Split("012", 2), "here")
    assert "one split in here has no names of classes" in caplog.text


@pytest.mark.parametrize(
    ("classes", "most", "outputs", "fits"),
    [(ANIMALS, 2, 3, True), (ANIMALS, 2, 2, False), (ANIMALS, 1, 4, False), ("012", 2, 4, True), ("012", 2, 2, False)],
)
def test_test_images_are_compared_with_a_networks_outputs(classes, most, outputs, fits):
    if fits:
        check_outputs(Split(classes, most), outputs, "here")
        return
    with pytest.raises(DataError, match=f"the network has {outputs} outputs, the images in here are of 3 classes"):
        check_outputs(Split(classes, most), outputs, "here")


@pytest.mark.parametrize("start", [lambda config: prepare(config, network()), lambda config: dry_run(config)])
def test_nothing_starts_on_splits_that_disagree(tmp_path, start):
    rows = [(png(n, (16, 16)), n % 3) for n in range(6)]
    write_parquet(tmp_path / "train.parquet", rows, names=list(ANIMALS))
    write_parquet(tmp_path / "test.parquet", rows, names=["dog", "cat", "eel"])
    config = small_run(tmp_path / "runs")
    config = replace(config, data=replace(config.data, path=str(tmp_path), format="auto"))
    with pytest.raises(DataError, match=r"label 0 is 'cat' in training and 'dog' in the test images"):
        start(config)


def test_test_labels_beyond_the_training_classes(tmp_path):
    write_parquet(tmp_path / "train.parquet", [(png(n, (16, 16)), n % 2) for n in range(4)])
    write_parquet(tmp_path / "test.parquet", [(png(n, (16, 16)), n) for n in range(3)])
    config = small_run(tmp_path / "runs")
    config = replace(config, data=replace(config.data, path=str(tmp_path), format="auto"))
    with pytest.raises(DataError, match=r"test images have labels up to 2, the training images 2 classes \(0 to 1\)"):
        prepare(config, network())


def test_class_folders_that_training_lacks_stay_refused(tmp_path):
    put(tmp_path, "train/a/1.jpg", "val/a/1.jpg", "val/b/1.jpg")
    config = small_run(tmp_path / "runs")
    config = replace(config, data=replace(config.data, path=str(tmp_path), format="auto"))
    with pytest.raises(DataError, match=r"1 class folders that the training images do not have \(b\)"):
        prepare(config, network())


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(1024, 3))
