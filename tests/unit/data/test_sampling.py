"""Order, shares and augmentation windows as functions of (seed, epoch, image)."""

import math

import numpy as np
import pytest

from laasp_ray.config import DataConfig
from laasp_ray.data.augmentation import centre
from laasp_ray.data.ordering import derive_seed, epoch_batches, eval_batches, hash_uint64, rank_share, windows
from laasp_ray.errors import DataError

CROP = DataConfig(image_size=224)


def drawn(count, size, config=CROP, seed=0, epoch=0):
    return windows(np.arange(count), np.tile(size, (count, 1)), config=config, seed=seed, epoch=epoch)


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [
        (10, 4, [4, 3, 3]),
        (8, 4, [4, 4]),
        (9, 8, [5, 4]),
        (3, 10, [3]),
        (1, 1, [1]),
    ],
)
def test_an_epoch_is_every_image_once_in_nearly_equal_batches(n, batch_size, sizes):
    batches = epoch_batches(n, batch_size=batch_size, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(np.concatenate(batches)) == list(range(n))


def test_order_depends_on_seed_and_epoch_but_not_on_batch_size():
    def order(batch_size, seed, epoch):
        return np.concatenate(epoch_batches(1000, batch_size=batch_size, seed=seed, epoch=epoch)).tolist()

    assert order(7, 1, 2) == order(256, 1, 2)
    assert len({tuple(order(7, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    # A fair shuffle has about one fixed point, and neighbours are about n/3 apart.
    first = np.array(order(7, 1, 2))
    assert (first == np.arange(1000)).sum() < 8
    assert 300 < np.abs(np.diff(first)).mean() < 367


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_a_batch_without_overlap(world):
    batch = np.array([9, 4, 7, 1, 0, 3, 8])
    shares = [rank_share(batch, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shares)) == sorted(batch)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("n", "batch_size", "world"), [(10, 4, 1), (10, 4, 3), (2, 4, 3), (12, 4, 3), (101, 16, 4)])
def test_evaluation_sees_every_image_once_over_all_ranks(n, batch_size, world):
    ranks = [eval_batches(n, batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    seen = [index for batches in ranks for batch in batches for index in batch]
    assert sorted(seen) == list(range(n))
    assert all(0 < len(batch) <= batch_size for batches in ranks for batch in batches)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: epoch_batches(0, batch_size=4, seed=0, epoch=0),
        lambda: epoch_batches(4, batch_size=0, seed=0, epoch=0),
        lambda: rank_share(np.arange(3), 2, 2),
        lambda: eval_batches(3, batch_size=1, rank=-1, world=2),
    ],
)
def test_impossible_shares_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be"):
        wrong()


def test_seeds_derive_by_name():
    assert derive_seed(0, "order") == derive_seed(0, "order")
    assert len({derive_seed(seed, name) for seed in range(20) for name in ("a", "b", "1", "11")}) == 80
    # The first 8 bytes of sha256(b"0/order"), halved: pinned, since stored runs depend on it.
    assert derive_seed(0, "order") == int.from_bytes(__import__("hashlib").sha256(b"0/order").digest()[:8], "big") // 2


def test_the_hash_is_splitmix64():
    # A published sequence: splitmix64 seeded with 1234567 begins so. hash(key, v) = mix(v * golden ^ mix(key)).
    def mix(state):
        mask = (1 << 64) - 1
        z = (state + 0x9E3779B97F4A7C15) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    assert mix(1234567) == 6457827717110365317
    values = np.array([0, 1, 2, 10**6])
    expected = [mix((int(v) * 0x9E3779B97F4A7C15 & (1 << 64) - 1) ^ mix(42)) for v in values]
    assert hash_uint64(42, values).tolist() == expected


def test_a_window_depends_on_seed_epoch_and_image_alone():
    whole = drawn(100, (300, 400))
    some = windows(np.array([70, 3]), [(300, 400), (300, 400)], config=CROP, seed=0, epoch=0)
    for name in ("y", "x", "height", "width", "flip"):
        assert getattr(some, name).tolist() == getattr(whole, name)[[70, 3]].tolist()
    assert drawn(100, (300, 400), epoch=1).y.tolist() != whole.y.tolist()
    assert drawn(100, (300, 400), seed=1).y.tolist() != whole.y.tolist()


def test_random_resized_crop_has_the_shares_and_ratios_asked_for():
    found = drawn(20_000, (1000, 1000))
    share = found.height * found.width / 1e6
    ratio = np.log(found.width / found.height)
    assert share.min() > 0.079 and share.max() <= 1.0
    assert abs(ratio).max() < math.log(4 / 3) + 0.01
    # Uniform over 0.08..0.75, where every ratio fits: the median of these is their middle.
    assert np.median(share[share < 0.75]) == pytest.approx((0.08 + 0.75) / 2, abs=0.01)
    assert ratio.mean() == pytest.approx(0, abs=0.005)
    assert found.flip.mean() == pytest.approx(0.5, abs=0.015)
    assert (found.y >= 0).all() and (found.y + found.height <= 1000).all()
    assert (found.x >= 0).all() and (found.x + found.width <= 1000).all()
    # Placed uniformly: the mean free row is half of the free rows.
    free = found.height < 900
    assert (found.y[free] / (1000 - found.height[free])).mean() == pytest.approx(0.5, abs=0.01)


def test_random_resized_crop_is_distributed_as_torchvisions():
    import torch
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(3, 120, 200)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    ours = drawn(4000, (120, 200))
    for column, mine in enumerate((ours.y, ours.x, ours.height, ours.width)):
        quantiles = np.quantile(theirs[:, column], (0.1, 0.25, 0.5, 0.75, 0.9))
        assert np.quantile(mine, (0.1, 0.25, 0.5, 0.75, 0.9)) == pytest.approx(quantiles, abs=4)


@pytest.mark.parametrize(
    ("size", "window"),
    [
        # The whole area never fits an aspect of 10 or of 1/10 into 3/4..4/3: the centre at the nearest ratio.
        ((100, 1000), (0, 433, 100, 133)),
        ((1000, 90), (440, 0, 120, 90)),
    ],
)
def test_the_centre_is_taken_when_no_window_fits(size, window):
    config = DataConfig(image_size=32, eval_resize=32, scale=(0.9, 1.0))
    found = drawn(5, size, config)
    assert [(*row,) for row in np.stack([found.y, found.x, found.height, found.width], 1).tolist()] == [window] * 5


def test_pad_crop_reaches_each_of_the_nine_shifts():
    config = DataConfig(image_size=32, eval_resize=0, train_transform="pad_crop", pad=4)
    found = drawn(8100, (32, 32), config)
    counts = np.zeros((9, 9), int)
    np.add.at(counts, (found.y + 4, found.x + 4), 1)
    assert counts.min() > 50 and counts.max() < 160  # 100 expected each, five sigmas
    assert set(found.height) == set(found.width) == {32}


def test_flip_probability_holds_at_its_ends():
    assert not drawn(1000, (64, 64), DataConfig(image_size=32, flip=0.0)).flip.any()
    assert drawn(1000, (64, 64), DataConfig(image_size=32, flip=1.0)).flip.all()


def test_an_image_smaller_than_the_padded_window_is_an_error():
    config = DataConfig(image_size=32, eval_resize=0, train_transform="pad_crop", pad=4)
    with pytest.raises(DataError, match=r"image number 7 is 20 x 32 pixels: with data.pad 4"):
        windows(np.array([7]), [(20, 32)], config=config, seed=0, epoch=0)


@pytest.mark.parametrize(
    ("size", "resized", "first"),
    [
        ((375, 500), (256, 341), (16, 58)),  # int(256 * 500 / 375) = 341; (341 - 224) / 2 = 58.5, to the even 58
        ((500, 375), (341, 256), (58, 16)),
        ((256, 256), (256, 256), (16, 16)),
        ((100, 100), (256, 256), (16, 16)),
    ],
)
def test_evaluation_takes_the_centre_of_the_resized_image(size, resized, first):
    placement = centre(np.array([size]), CROP)
    assert tuple(placement.resized[0]) == resized
    assert (placement.windows.y[0], placement.windows.x[0]) == first
    assert not placement.windows.flip.any()


def test_evaluation_without_resizing_pads_small_images_evenly():
    placement = centre(np.array([[30, 33]]), DataConfig(image_size=32, eval_resize=0))
    assert tuple(placement.resized[0]) == (30, 33)
    assert (placement.windows.y[0], placement.windows.x[0]) == (-1, 0)  # one row above; 0.5 to the even 0
