"""DALI and torchvision: each image once, the same pixels whatever the batches, and unreadable files left out."""

import dataclasses
import io
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import BOTH, COUNT, Opened, configured, encoded, epoch_of, picture, same
from PIL import Image

from laasp_ray.config import DataConfig
from laasp_ray.data.loaders import registry as loader_module
from laasp_ray.data.loaders.decoding import normalise
from laasp_ray.data.ordering import eval_batches, rank_share, windows
from laasp_ray.errors import ConfigError

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"


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
