"""A data set of one's own: what an import path in data.format opens."""

from pathlib import Path

import numpy as np
import pytest

from laasp_ray.config import DATA_FORMATS, DataConfig
from laasp_ray.data.sources.cifar import bitmap
from laasp_ray.data.sources.registry import LAYOUTS, open_source, open_test_source
from laasp_ray.errors import ConfigError, DataError


class Source:
    """Three training images and two test images, of two classes."""

    def __init__(self, config, split):
        self.config, self.split = config, split
        self.labels = np.array([0, 1, 1] if split == "train" else [1, 0], np.int64)
        self.classes = ("a", "b")

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        return bitmap(np.full((3, 2, 2), index, np.uint8))

    def name(self, index):
        return f"{self.split}/{index}"


def config(name, path=None):
    return DataConfig(path=path, format=f"{__name__}:{name}", image_size=32)


def changed(**attributes):
    """A source with other attributes."""

    def make(config, split):
        source = Source(config, split)
        for name, value in attributes.items():
            setattr(source, name, value)
        return source

    return make


short = changed(labels=np.array([0, 1], np.int32))
a_list = changed(labels=[0, 1])
one_name = changed(classes="ab")
twice = changed(classes=("a", "a"))
unreadable = changed(read=None)
no_images = changed(labels=np.array([], np.int64))
no_such_class = changed(labels=np.array([0, 1, 2], np.int64))


class Longer(Source):
    def __len__(self):
        return 7


def fails(config, split):
    raise KeyError(split)


def refuses(config, split):
    raise DataError("no data set today")


def is_not_there(config, split):
    Path("/no/such/file").read_bytes()


def test_it_is_called_with_the_config_and_the_split():
    given = config("Source", "/anywhere")
    train, test = (open_source(given, split) for split in ("train", "test"))
    assert (train.config, train.split, test.split) == (given, "train", "test")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 1], [1, 0])
    assert test.read(1) == bitmap(np.full((3, 2, 2), 1, np.uint8)) and test.name(1) == "test/1"


def test_its_test_images_alone():
    assert open_test_source(config("Source"), ("a", "b")).labels.tolist() == [1, 0]
    assert open_test_source(config("Source"), None).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothing", ConfigError, r":nothing' cannot be imported"),
        ("fails", ConfigError, r":fails' failed to open the train images: KeyError: 'train'"),
        ("refuses", DataError, r"^no data set today$"),
        ("is_not_there", DataError, r"the data set in .*:is_not_there cannot be read: /no/such/file: No such file"),
        ("changed", ConfigError, r":changed' failed to open the train images: TypeError"),
        ("short", ConfigError, r"labels are int32 of shape \(2,\), must be a numpy array of int64 of shape \(n,\)"),
        ("a_list", ConfigError, r"gave a Source for the train images that is no ImageSource.*labels are list"),
        ("one_name", ConfigError, r"its classes are ab, must be a tuple of strings"),
        ("twice", ConfigError, r"two of its classes have the same name"),
        ("unreadable", ConfigError, r"it has no method read"),
        ("Longer", ConfigError, r"its length is 7, and it has 3 labels"),
        ("no_images", DataError, rf"the train split of data\.format '{__name__}:no_images' has no images"),
        ("no_such_class", DataError, r":no_such_class': image number 2 has the label 2, of 2 classes"),
    ],
)
def test_what_is_wrong_with_it_is_told(name, error, message):
    with pytest.raises(error, match=message):
        open_source(config(name), "train")


def test_a_format_is_a_known_name_or_an_import_path():
    with pytest.raises(ConfigError, match=r"data\.format is 'foldr', must be one of 'auto', .*, or an import path"):
        DataConfig(format="foldr")


def test_the_configs_names_are_the_layouts():
    assert set(DATA_FORMATS) == {"auto", "digits", *LAYOUTS}
