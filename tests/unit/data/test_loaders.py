"""DALI and torchvision: each image once, the same pixels whatever the batches, and unreadable files left out."""

import dataclasses
import errno
import io
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from laasp_ray.config import DataConfig
from laasp_ray.data import feed as feed_module
from laasp_ray.data import loader as loader_module
from laasp_ray.data import torchvision_loader
from laasp_ray.data.feed import UnreadableImages
from laasp_ray.data.loader import make_loader, normalise
from laasp_ray.data.sampling import epoch_batches, eval_batches, rank_share, windows
from laasp_ray.data.sources import open_source
from laasp_ray.errors import ConfigError, DataError

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"
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


@pytest.fixture
def folder(tmp_path):
    for number in range(COUNT):
        for split in ("train", "val"):
            place = tmp_path / split / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:03d}.JPEG").write_bytes(encoded(picture(number)))
    return tmp_path


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


@BOTH
def test_training_pixels_do_not_depend_on_batches_ranks_threads_or_restart(folder, name):
    with Opened(folder, name) as first:
        reference = {epoch: first.pixels(epoch_of(16, epoch), epoch) for epoch in (0, 1)}
        assert reference[0].keys() == set(range(COUNT))
        assert not torch.equal(reference[0][3], reference[1][3])
        assert same(first.pixels(epoch_of(5), 0), reference[0])
    threads = dataclasses.replace(configured(folder, name), threads=1)
    with Opened(folder, name, config=threads, max_batch=3) as fresh:
        shares = {}
        for rank in range(3):
            shares.update(fresh.pixels([rank_share(batch, rank, 3) for batch in epoch_of(9, 1)], 1))
        assert same(shares, reference[1])
    with Opened(folder, name, seed=1) as other:
        assert not torch.equal(other.pixels(epoch_of(16))[3], reference[0][3])


@BOTH
def test_evaluation_sees_each_image_once_and_the_same(folder, name):
    with Opened(folder, name, training=False) as opened:
        whole = opened.pixels(eval_batches(COUNT, batch_size=16, rank=0, world=1))
        assert whole.keys() == set(range(COUNT))
        parts = {}
        for rank in range(5):
            parts.update(opened.pixels(eval_batches(COUNT, batch_size=2, rank=rank, world=5), epoch=7))
        assert same(parts, whole)


@BOTH
@pytest.mark.parametrize("taken", [1, 2, 4])
def test_an_epoch_broken_off_does_not_disturb_the_next(folder, name, taken):
    with Opened(folder, name) as opened:
        reference = opened.pixels(epoch_of(4, 1), 1)
        abandoned = opened.loader.epoch(epoch_of(4), 0)
        for _ in range(taken):
            next(abandoned)
        assert same(opened.pixels(epoch_of(4, 1), 1), reference)
        with pytest.raises(RuntimeError, match=r"given up when its loader began another epoch"):
            next(abandoned)
        assert same(opened.pixels(epoch_of(4, 1), 1), reference)


@BOTH
def test_batches_stay_as_they_were_while_the_loader_goes_on(folder, name):
    with Opened(folder, name) as opened:
        kept = list(opened.loader.epoch(epoch_of(4)))
        copies = [batch.images.clone() for batch in kept]
        for epoch in range(1, 6):
            opened.pixels(epoch_of(4, epoch), epoch)
        assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies, strict=True))
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies, strict=True))


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_uint8_normalised_is_what_comes_otherwise(folder, name, training):
    batches = epoch_of(16)
    with Opened(folder, name, training=training) as floats, Opened(folder, name, training=training, uint8=True) as raw:
        expected, pixels = floats.pixels(batches), raw.pixels(batches)
        for index, image in pixels.items():
            assert image.dtype == torch.uint8 and image.shape == (3, 32, 32)
            assert torch.allclose(normalise(image[None], raw.config)[0], expected[index], atol=1e-6, rtol=0)


def test_normalise_by_hand():
    config = DataConfig(mean=(0.5, 0.0, 0.2), std=(0.5, 1.0, 0.4))
    pixel = torch.tensor([255, 51, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    assert normalise(pixel, config).flatten().tolist() == pytest.approx([1.0, 0.2, -0.5], abs=1e-6)


@BOTH
def test_pad_crop_moves_pixels_and_nothing_else(tmp_path, name):
    generator = np.random.default_rng(0)
    originals = generator.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for number, pixels in enumerate(originals):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "a" / f"{number:02d}.png").write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    config = configured(tmp_path, name, train_transform="pad_crop", eval_resize=0)
    with Opened(tmp_path, name, config=config, uint8=True) as opened:
        found = opened.pixels([np.arange(12)], epoch=3)
    drawn = windows(np.arange(12), [(32, 32)] * 12, config=config, seed=0, epoch=3)
    assert drawn.flip.any() and not drawn.flip.all()
    for number, pixels in enumerate(originals):
        padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
        y, x = drawn.y[number] + 4, drawn.x[number] + 4
        expected = padded[y : y + 32, x : x + 32]
        expected = expected[:, ::-1] if drawn.flip[number] else expected
        assert np.array_equal(found[number].permute(1, 2, 0).numpy(), expected)


@BOTH
@pytest.mark.parametrize("eval_resize", [0, 32])
def test_an_image_of_the_wanted_size_is_not_resampled(tmp_path, name, eval_resize):
    original = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "1.png").write_bytes(encoded(Image.fromarray(original), "PNG"))
    config = configured(tmp_path, name, eval_resize=eval_resize, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    for training in (True, False):
        with Opened(tmp_path, name, config=config, training=training, uint8=True) as opened:
            image = opened.pixels([np.array([0])])[0]
            assert np.array_equal(image.permute(1, 2, 0).numpy(), original)


@BOTH
def test_evaluation_is_torchvisions_resize_and_centre_crop(folder, name):
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    theirs = Compose([Resize(36), CenterCrop(32), PILToTensor()])
    with Opened(folder, name, training=False, uint8=True) as opened:
        for index, image in opened.pixels(eval_batches(COUNT, batch_size=16, rank=0, world=1)).items():
            expected = theirs(Image.open(io.BytesIO(opened.source.read(index))))
            difference = (image.float() - expected.float()).abs()
            if name == "torchvision":
                assert difference.max() == 0
            assert difference.mean() < 0.5 and difference.max() <= 3


@BOTH
def test_grey_cmyk_palette_and_rotated_files_come_as_rgb(tmp_path, name):
    place = tmp_path / "train" / "a"
    place.mkdir(parents=True)
    image = picture(2)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    image.convert("L").save(place / "1.jpg")
    image.save(place / "2.png", exif=rotated)
    image.save(place / "3.jpg", exif=rotated, quality=95)
    image.save(place / "4.webp", lossless=True)
    image.convert("P").save(place / "5.bmp")
    image.convert("RGBA").save(place / "6.png")
    config = configured(tmp_path, name, image_size=16, eval_resize=0, scale=(1.0, 1.0), ratio=(0.1, 10.0), flip=0.0)
    with Opened(tmp_path, name, config=config, uint8=True) as opened:
        found = opened.pixels([np.arange(6)])
    whole = torch.from_numpy(np.array(image.resize((16, 16), Image.Resampling.BILINEAR))).permute(2, 0, 1).float()
    grey = torch.from_numpy(np.array(image.convert("L").resize((16, 16), Image.Resampling.BILINEAR))).float()
    assert (found[0].float() - grey).abs().mean() < 3
    assert all((found[index].float() - whole).abs().mean() < 3 for index in (1, 2, 3, 5))
    assert (found[4].float() - whole).abs().mean() < 12  # the palette's own loss


def test_both_loaders_show_the_same_of_real_images(tmp_path):
    sample = SHARED / "imagenet_sample"
    if not sample.is_dir():
        pytest.skip("../shared/data/imagenet_sample is not there")
    for number, file in enumerate(sorted(sample.glob("*/*.JPEG"))[::12]):
        for split in ("train", "val"):
            place = tmp_path / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    for training in (True, False):
        pixels = {}
        for name in ("dali", "torchvision"):
            config = configured(tmp_path, name, image_size=224, eval_resize=256)
            with Opened(tmp_path, name, config=config, training=training, uint8=True) as opened:
                pixels[name] = opened.pixels([np.arange(8), np.arange(8, 21)], epoch=5)
        assert len(pixels["dali"]) == 21
        for index, image in pixels["dali"].items():
            difference = (image.float() - pixels["torchvision"][index].float()).abs()
            # Resampling rounds differently by one step of 255; half a pixel's shift gives ten times as much.
            assert difference.mean() < 0.5 and difference.max() < 16


def test_cifar_images_are_the_same_from_both_loaders():
    if not (SHARED / "cifar10_mini").is_dir():
        pytest.skip("../shared/data/cifar10_mini is not there")
    path = SHARED / "cifar10_mini"
    for training in (True, False):
        pixels = []
        for name in ("dali", "torchvision"):
            config = configured(path, name, train_transform="pad_crop", eval_resize=0)
            with Opened(path, name, config=config, training=training, uint8=True) as opened:
                pixels.append(opened.pixels([np.arange(k, k + 16) for k in range(0, 160, 16)], epoch=2))
        assert len(pixels[0]) == 160 and same(*pixels)


# ---- unreadable files


def file_of(folder, number, split="train"):
    return folder / split / "ab"[number % 2] / f"{number:03d}.JPEG"


def index_of(source, number):
    return next(i for i in range(len(source)) if source.name(i).endswith(f"{number:03d}.JPEG"))


def breakages(folder):
    """Five kinds of broken file: by number, what is left of the file."""
    whole = file_of(folder, 6).read_bytes()
    return {
        3: b"",
        6: whole[: len(whole) // 2],
        11: bytes(range(256)) * 20,
        12: whole[:-200],
        17: encoded(picture(17), "PNG")[:-300],
    }


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_broken_files_are_left_out_and_all_others_come_once(folder, name, training):
    split = "train" if training else "val"
    with Opened(folder, name, training=training) as opened:
        reference = opened.pixels(epoch_of(5))
    broken = breakages(folder)
    for number, content in broken.items():
        file_of(folder, number, split).write_bytes(content)
    with Opened(folder, name, training=training) as opened:
        gone = {index_of(opened.source, number) for number in broken}
        for _ in range(2):
            found = opened.pixels(epoch_of(5))
            assert same(found, {index: image for index, image in reference.items() if index not in gone})
        assert sorted(opened.told) == sorted(opened.source.name(index) for index in gone)
        order = [b.indices.tolist() for b in opened.loader.epoch(epoch_of(5))]
        assert order == [[i for i in batch.tolist() if i not in gone] for batch in epoch_of(5)]


@BOTH
def test_a_broken_file_in_an_abandoned_batch_does_no_harm(folder, name):
    with Opened(folder, name) as opened:
        reference = opened.pixels(epoch_of(4))
        broken = int(epoch_of(4)[1][2])
        (folder / opened.source.name(broken)).write_bytes(breakages(folder)[6])
        next(opened.loader.epoch([np.array([(broken + 1) % COUNT]), np.array([broken])]))
        found = opened.pixels(epoch_of(4))
        assert same(found, {index: image for index, image in reference.items() if index != broken})


@BOTH
def test_a_file_that_vanishes_is_left_out(folder, name, monkeypatch):
    monkeypatch.setattr(feed_module, "RETRY_PAUSES_S", (0.0,))
    with Opened(folder, name) as opened:
        missing = opened.source.name(5)
        (folder / missing).unlink()
        assert opened.pixels(epoch_of(4)).keys() == set(range(COUNT)) - {5}
        assert opened.told == [missing]


class Storage:
    """A source whose `read` fails for `images`, the first `times` times that each is asked for; from the moment that
    image `gone_at` is asked for, for all."""

    def __init__(self, source, images=(), times=None, gone_at=None, error=None, content=None):
        self._source, self._times, self._gone_at, self._content = source, times, gone_at, content
        self._asked, self._error, self.gone = dict.fromkeys(images, 0), error, False

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def read(self, index):
        self.gone = self.gone or index == self._gone_at
        if self.gone or (index in self._asked and (self._times is None or self._asked[index] < self._times)):
            self._asked[index] = self._asked.get(index, 0) + 1
            if self._content is not None:
                return self._content
            raise self._error or OSError(5, f"Input/output error {index}")
        return self._source.read(index)


def feed_of(folder, monkeypatch, *, batch=4, threads=1, max_unreadable=20, count=COUNT, **failing):
    """Batches through reading threads over a storage that fails, and whom it left out."""
    monkeypatch.setattr(feed_module, "RETRY_PAUSES_S", (0.0, 0.0, 0.0))
    config = configured(folder, "torchvision", max_unreadable=max_unreadable)
    source, told = Storage(open_source(config, "train"), **failing), []
    unreadable = UnreadableImages(source, config.max_unreadable, (), told.append)
    feed = feed_module.ImageFeed(source, unreadable, threads=threads, max_batch=batch)
    batches = []
    try:
        for read in feed.read(np.array_split(np.arange(count), -(-count // batch))):
            batches.append(read.indices.tolist())
    finally:
        feed.close()
        told_so_far.clear()
        told_so_far.extend(told)
    return batches, told


told_so_far: list[str] = []
"""Whom the last `feed_of` left out, also if it raised."""


def test_a_storage_that_recovers_costs_no_image(folder, monkeypatch, caplog):
    batches, told = feed_of(folder, monkeypatch, images={1, 2, 3, 5}, times=3)
    assert batches == [list(range(first, first + 4)) for first in range(0, COUNT, 4)] and told == []
    assert "1 of 4 images could not be read (train/a/010.JPEG: [Errno 5] Input/output error 5)" in caplog.text


def test_an_image_that_cannot_be_read_for_good_is_left_out(folder, monkeypatch, caplog):
    batches, told = feed_of(folder, monkeypatch, images={5})
    assert batches[1] == [4, 6, 7] and told == ["train/a/010.JPEG"]
    assert "010.JPEG is left out from now on: [Errno 5] Input/output error 5" in caplog.text


@pytest.mark.parametrize(("batch", "threads"), [(4, 1), (4, 4), (16, 16), (1, 2), (5, 2)])
def test_a_storage_that_is_gone_ends_the_run_and_blames_no_image(folder, monkeypatch, batch, threads):
    with pytest.raises(DataError, match=r"storage cannot be read: .* images failed, .*\.JPEG: .*error \d.*again"):
        feed_of(folder, monkeypatch, batch=batch, threads=threads, gone_at=4)
    assert told_so_far == []


def test_a_storage_gone_in_the_middle_of_a_batch_blames_no_image(folder, monkeypatch):
    # Three of four images were read before it was gone: by hand the fourth looks like one broken image.
    with pytest.raises(DataError, match=r"1 of 4 images failed, the first .*: .*, and 5 of 5 others that were tried"):
        feed_of(folder, monkeypatch, gone_at=3, count=4)
    assert told_so_far == []


def test_a_storage_that_gives_empty_files_blames_no_image(folder, monkeypatch):
    with pytest.raises(DataError, match=r"storage cannot be read: 1 of 4 .*the file is empty, and 5 of 5 others"):
        feed_of(folder, monkeypatch, gone_at=3, content=b"", count=4)
    assert told_so_far == []


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENOMEM])
def test_what_the_machine_lacks_blames_no_image(folder, monkeypatch, number):
    with pytest.raises(DataError, match=rf"storage cannot be read: 1 of 4 .*Errno {number}\] the machine's; no image"):
        feed_of(folder, monkeypatch, images={5}, error=OSError(number, "the machine's"))
    assert told_so_far == []


def test_the_storage_back_when_images_are_about_to_be_blamed_costs_none(folder, monkeypatch):
    batches, told = feed_of(folder, monkeypatch, batch=16, threads=16, images=range(16), times=4)
    assert [len(batch) for batch in batches] == [12, 12] and told == []


@pytest.mark.parametrize("threads", [1, 4])
def test_a_whole_batch_that_cannot_be_read_is_left_out_while_all_others_can(folder, monkeypatch, threads):
    batches, told = feed_of(folder, monkeypatch, images={4, 5, 6, 7}, threads=threads)
    assert len(told) == 4 and [4, 5, 6, 7] not in batches and sum(map(len, batches)) == COUNT - 4


def test_an_only_image_that_cannot_be_read_is_no_broken_one(tmp_path, monkeypatch):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.JPEG").write_bytes(encoded(picture(1)))
    with pytest.raises(DataError, match="1 of 1 images failed"):
        feed_of(tmp_path, monkeypatch, images={0}, count=1)


@BOTH
def test_excluded_images_never_come_and_are_not_told_again(folder, name):
    file_of(folder, 6).write_bytes(b"")
    with Opened(folder, name, excluded=["train/a/006.JPEG", "train/b/001.JPEG"]) as opened:
        gone = {index_of(opened.source, 6), index_of(opened.source, 1)}
        assert opened.pixels(epoch_of(5)).keys() == set(range(COUNT)) - gone
        assert opened.told == []


@BOTH
def test_a_batch_of_which_nothing_is_left_is_skipped(folder, name):
    file_of(folder, 0).write_bytes(b"")
    broken = file_of(folder, 2).read_bytes()
    file_of(folder, 2).write_bytes(broken[: len(broken) // 2])
    with Opened(folder, name) as opened:
        first, second = index_of(opened.source, 0), index_of(opened.source, 2)
        batches = [np.array(batch) for batch in ([5, 6], [first], [second], [7], [first, second], [8])]
        seen = [batch.indices.tolist() for batch in opened.loader.epoch(batches)]
        assert seen == [[5, 6], [7], [8]]


@BOTH
def test_too_many_unreadable_images_end_the_run_by_name(folder, name):
    for number, content in breakages(folder).items():
        file_of(folder, number).write_bytes(content)
    config = configured(folder, name, max_unreadable=4)
    with Opened(folder, name, config=config) as opened:
        with pytest.raises(DataError, match=r"5 images are unreadable, data.max_unreadable allows 4: .*\.JPEG"):
            opened.pixels(epoch_of(5))
        assert len(opened.told) == 5
    with pytest.raises(DataError, match=r"2 images are unreadable, data.max_unreadable allows 1: x, y"):
        Opened(folder, name, config=configured(folder, name, max_unreadable=1), excluded=["x", "y"])


def grey_png(values):
    """A 16-bit grey PNG file."""
    return encoded(Image.fromarray(values.astype(np.uint16)), "PNG")


def odd_files():
    """Files at which decoders differ, by what they are."""
    whole = encoded(picture(6), "PNG")
    return {
        "GIF": encoded(picture(6).quantize(), "GIF"),
        "TGA": encoded(picture(6), "TGA"),
        "PNG without its end": whole[:-12],
        "PNG with a wrong check sum": whole[:-14] + b"????" + whole[-10:],
    }


@pytest.mark.parametrize("kind", [*odd_files(), "JPEG without its end", "PNG cut off"])
@pytest.mark.parametrize("training", [True, False])
def test_both_loaders_leave_out_the_same_images(folder, kind, training):
    """What Pillow decodes is admitted by DALI too, with the same pixels."""
    content = odd_files().get(kind)
    if content is None:
        content = encoded(picture(6))[:-2] if kind.startswith("JPEG") else encoded(picture(6), "PNG")[:-300]
    file_of(folder, 6, "train" if training else "val").write_bytes(content)
    found, told = {}, {}
    for name in ("dali", "torchvision"):
        with Opened(folder, name, training=training, uint8=True) as opened:
            for _ in range(2):
                found[name] = opened.pixels(epoch_of(5))
            told[name] = opened.told
            index = index_of(opened.source, 6)
    assert told["dali"] == told["torchvision"] and found["dali"].keys() == found["torchvision"].keys()
    assert (index in found["dali"]) == (kind in odd_files())
    if index in found["dali"]:
        assert (found["dali"][index].float() - found["torchvision"][index].float()).abs().mean() < 0.5
    assert len(found["dali"]) >= COUNT - 1


def test_bytes_after_a_jpeg_do_no_harm(folder):
    file_of(folder, 6).write_bytes(encoded(picture(6)) + b"what a camera adds" * 50)
    for name in ("dali", "torchvision"):
        with Opened(folder, name) as opened:
            assert len(opened.pixels(epoch_of(5))) == COUNT and opened.told == []


@BOTH
def test_grey_of_16_bits_keeps_its_shades(tmp_path, name):
    values = np.arange(16 * 16).reshape(16, 16) * 257  # 0 to 65535: 257 steps each for one of 8 bits
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "1.png").write_bytes(grey_png(values))
    config = configured(tmp_path, name, image_size=16, eval_resize=0)
    with Opened(tmp_path, name, training=False, config=config, uint8=True) as opened:
        image = opened.pixels([np.array([0])])[0]
    for channel in image:
        assert channel.flatten().tolist() == list(range(256))


def test_pixels_of_no_known_range_are_refused():
    numbers = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    with pytest.raises(OSError, match=r"floating point numbers, of no known range: save it with 8 or 16 bits"):
        feed_module.decode_rgb(encoded(numbers, "TIFF"))
    large = Image.fromarray(np.full((4, 4), 70_000, np.int32))
    with pytest.raises(OSError, match="more than 16 bits"):
        feed_module.decode_rgb(encoded(large, "TIFF"))


@BOTH
@pytest.mark.parametrize(("height", "width"), [(1, 8000), (8000, 1), (3, 1001)])
def test_a_line_of_pixels_is_evaluated_without_blowing_it_up(tmp_path, name, height, width, monkeypatch):
    longer = max(height, width)
    ramp = np.linspace(0, 255, longer).round().astype(np.uint8)
    pixels = np.broadcast_to(ramp[:, None, None] if height > width else ramp[None, :, None], (height, width, 3))
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "1.png").write_bytes(encoded(Image.fromarray(np.ascontiguousarray(pixels)), "PNG"))
    placed, place = [], torchvision_loader.place
    module = torchvision_loader if name == "torchvision" else sys.modules["laasp_ray.data.dali"]
    monkeypatch.setattr(module, "place", lambda *args, **kw: placed.append(place(*args, **kw)) or placed[-1])
    config = configured(tmp_path, name, image_size=24, eval_resize=32)
    with Opened(tmp_path, name, training=False, config=config, uint8=True) as opened:
        for _ in range(2):
            image = opened.pixels([np.array([0])])[0]
    assert max(placement.resized.max() for placement in placed) <= 32 * 16
    # By hand: the middle of the image, 24/32 of its shorter side long, where the ramp is half of 255.
    assert (image.float() - 127.5).abs().max() <= 1.5


def test_the_centre_of_a_long_image_has_its_middle():
    assert feed_module.centre_size((1, 8000), 16) == (1, 16)
    assert feed_module.centre_size((1, 8001), 16) == (1, 15)
    assert feed_module.centre_size((33, 2), 16) == (31, 2)
    assert feed_module.centre_size((32, 2), 16) == (32, 2)
    numbers = np.arange(40, dtype=np.uint8).reshape(1, 40)
    strip = feed_module.bitmap_of(encoded(Image.fromarray(numbers), "PNG"), feed_module.centre_size((1, 40), 16))
    assert np.asarray(Image.open(io.BytesIO(strip)))[0, :, 0].tolist() == list(range(12, 28))


def test_a_failure_without_a_broken_image_is_told(folder, monkeypatch):
    from laasp_ray.data import dali

    with Opened(folder, "dali") as opened:
        whole_batches = dali._DecodePipeline.take

        def failing(pipeline):
            images = whole_batches(pipeline)
            if len(images) > 1:
                raise RuntimeError("Critical error:\nout of memory\nCurrent pipeline object is no longer valid.")
            return images

        monkeypatch.setattr(dali._DecodePipeline, "take", failing)
        with pytest.raises(DataError, match=r"2 batches of which every image can be decoded alone.*out of memory"):
            opened.pixels(epoch_of(5))
        assert opened.told == []


def test_an_unreadable_image_is_logged_with_its_reason(folder, caplog):
    file_of(folder, 3).write_bytes(b"")
    with Opened(folder, "dali") as opened, caplog.at_level(logging.WARNING):
        opened.pixels(epoch_of(5))
    assert [record.getMessage() for record in caplog.records] == [
        "unreadable image train/b/003.JPEG is left out from now on: the file is empty"
    ]


# ---- which loader


def test_a_batch_larger_than_promised_is_refused(folder):
    with Opened(folder, "dali", max_batch=4) as opened, pytest.raises(ValueError, match=r"5 images .* max_batch 4"):
        opened.pixels([np.arange(5)])


@pytest.fixture
def without_dali(monkeypatch):
    loader_module._say_once.cache_clear()
    monkeypatch.setattr(loader_module, "_dali_problem", lambda: "No module named 'nvidia'")
    yield
    loader_module._say_once.cache_clear()


def test_torchvision_takes_over_where_dali_is_missing_and_says_so_once(folder, without_dali, caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with Opened(folder, "auto") as opened:
                assert opened.loader.name == "torchvision"
    assert [record.getMessage() for record in caplog.records] == [
        "images are decoded by torchvision (DALI cannot be imported: No module named 'nvidia')"
    ]


def test_dali_asked_for_and_missing_is_an_error_with_the_remedy(folder, without_dali):
    with pytest.raises(ConfigError, match=r"imported .No module named 'nvidia'.; install nvidia-dali-cuda130"):
        Opened(folder, "dali")


def test_dali_is_the_choice_where_it_is_installed(folder):
    with Opened(folder, "auto") as opened:
        assert opened.loader.name == "dali-cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_a_gpu_decodes_nearly_the_same_pixels(folder, training):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with (
        Opened(folder, "dali", training=training, uint8=True) as cpu,
        Opened(folder, "dali", training=training, uint8=True, device=torch.device("cuda", 0)) as gpu,
    ):
        assert gpu.loader.name == "dali-gpu"
        expected, found = cpu.pixels(epoch_of(5)), gpu.pixels(epoch_of(5))
        assert expected.keys() == found.keys()
        for index, image in found.items():
            assert image.device.type == "cuda"
            assert (image.cpu().float() - expected[index].float()).abs().mean() < 2
