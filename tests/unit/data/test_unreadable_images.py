"""Files that cannot be read or decoded, and a storage that gives none: who is left out, and when a run ends."""

import errno
import io
import logging
import sys

import numpy as np
import pytest
from image_folders import BOTH, COUNT, Opened, configured, encoded, epoch_of, file_of, index_of, picture, same
from PIL import Image

from laasp_ray.data.loaders import decoding
from laasp_ray.data.loaders import pillow as torchvision_loader
from laasp_ray.data.loaders import reading as feed_module
from laasp_ray.data.loaders.reading import UnreadableImages
from laasp_ray.data.sources.registry import open_source
from laasp_ray.errors import DataError


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
        decoding.decode_rgb(encoded(numbers, "TIFF"))
    large = Image.fromarray(np.full((4, 4), 70_000, np.int32))
    with pytest.raises(OSError, match="more than 16 bits"):
        decoding.decode_rgb(encoded(large, "TIFF"))


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
    module = torchvision_loader if name == "torchvision" else sys.modules["laasp_ray.data.loaders.dali"]
    monkeypatch.setattr(module, "place", lambda *args, **kw: placed.append(place(*args, **kw)) or placed[-1])
    config = configured(tmp_path, name, image_size=24, eval_resize=32)
    with Opened(tmp_path, name, training=False, config=config, uint8=True) as opened:
        for _ in range(2):
            image = opened.pixels([np.array([0])])[0]
    assert max(placement.resized.max() for placement in placed) <= 32 * 16
    # By hand: the middle of the image, 24/32 of its shorter side long, where the ramp is half of 255.
    assert (image.float() - 127.5).abs().max() <= 1.5


def test_the_centre_of_a_long_image_has_its_middle():
    assert decoding.centre_size((1, 8000), 16) == (1, 16)
    assert decoding.centre_size((1, 8001), 16) == (1, 15)
    assert decoding.centre_size((33, 2), 16) == (31, 2)
    assert decoding.centre_size((32, 2), 16) == (32, 2)
    numbers = np.arange(40, dtype=np.uint8).reshape(1, 40)
    strip = decoding.bitmap_of(encoded(Image.fromarray(numbers), "PNG"), decoding.centre_size((1, 40), 16))
    assert np.asarray(Image.open(io.BytesIO(strip)))[0, :, 0].tolist() == list(range(12, 28))


def test_a_failure_without_a_broken_image_is_told(folder, monkeypatch):
    from laasp_ray.data.loaders import dali

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
