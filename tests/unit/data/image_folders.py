"""What the tests of loaders share: a folder of pictures, and a loader over it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from laasp_ray.config import DataConfig
from laasp_ray.data.loaders.registry import make_loader
from laasp_ray.data.ordering import epoch_batches
from laasp_ray.data.sources.registry import open_source

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("name", ["dali", "torchvision"])
COUNT = 24


def picture(number):
    """A smooth picture whose size and colours depend on its number."""
    height, width = 40 + 7 * (number % 5), 44 + 5 * (number % 7)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((y * (c + 1) + x * (number % 4 + 1)) / 17 + number) for c in range(3)]
    return Image.fromarray((127 + 120 * np.stack(waves, -1)).astype(np.uint8))


def encoded(image, format="JPEG"):
    file = io.BytesIO()
    image.save(file, format, **({"quality": 92} if format == "JPEG" else {}))
    return file.getvalue()


def configured(path, name, **changes):
    settings = {"image_size": 32, "eval_resize": 36, "loader": name, **changes}
    return DataConfig(path=str(path), **settings)


class Opened:
    """A loader over the training or test images of a folder, closed at the end."""

    def __init__(self, path, name, *, training=True, config=None, device=CPU, **options):
        self.config = config or configured(path, name)
        self.source = open_source(self.config, "train" if training else "test")
        self.told = []
        options = {"max_batch": 16, "on_unreadable": self.told.append, **options}
        self.loader = make_loader(self.source, self.config, training=training, device=device, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.loader.close()

    def pixels(self, batches, epoch=0):
        """{image index: its pixels}, each having come once, with its own label."""
        found = {}
        for batch in self.loader.epoch(batches, epoch):
            assert batch.labels.tolist() == self.source.labels[batch.indices].tolist()
            assert len(batch.images) == len(batch.indices) > 0
            for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
                assert index not in found
                found[index] = image
        return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[index], other[index]) for index in one)


def epoch_of(batch_size, epoch=0):
    return epoch_batches(COUNT, batch_size=batch_size, seed=0, epoch=epoch)


def file_of(folder, number, split="train"):
    return folder / split / "ab"[number % 2] / f"{number:03d}.JPEG"


def index_of(source, number):
    return next(i for i in range(len(source)) if source.name(i).endswith(f"{number:03d}.JPEG"))
