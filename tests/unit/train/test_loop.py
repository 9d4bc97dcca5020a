"""A spell of training without Ray: steps worked out by hand, one rank against two, and a spell that is cut off."""

import dataclasses
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import write_pictures
from torch import nn
from torch.nn import functional

from laasp_ray.config import DataConfig, TrainConfig
from laasp_ray.data.feed import Batch
from laasp_ray.data.sampling import epoch_batches
from laasp_ray.errors import TrainingError
from laasp_ray.train.data import SpellData
from laasp_ray.train.loop import EpochPlan, Spell, SpellDone, evaluate, run_spell

CPU = torch.device("cpu")
TRAIN_IMAGES, TEST_IMAGES, CLASSES = 22, 19, 3
CONFIG = TrainConfig(epochs=1, prune_epoch=0, batch_size=8, weight_decay=1e-3)
# Training batches of 8, 7 and 7: two ranks get 4 + 4 and 4 + 3. Test images: 10 and 9, in batches of 8.


class InMemory:
    """A loader over tensors that does not augment."""

    name = "in memory"

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def epoch(self, batches, epoch=0):
        for indices in batches:
            if len(indices):
                yield Batch(self.images[indices], self.labels[indices], indices)


class FakeData:
    """What `run_spell` needs of a SpellData; images of shape (n, features), the same for training and test."""

    device, in_format = CPU, staticmethod(lambda images: images)

    def __init__(self, images, labels, rank=0, world=1):
        self.images, self.labels = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
        self.rank, self.world = rank, world
        self.train_images = self.test_images = len(labels)
        self.train_loader = self.test_loader = InMemory(self.images, self.labels)
        self.share = -(-len(labels) // 2)

    def take_unreadable(self):
        return ()


def spell(*rates, done=0, excluded=(), first=0):
    plans = tuple(EpochPlan(epoch=7 + i, data_epoch=first + i, learning_rate=rate) for i, rate in enumerate(rates))
    return Spell(number=0, phase="train", epochs=plans, done=done, excluded=excluded)


def train(model, data, what, *, momentum=None, config=CONFIG, **options):
    """The epochs of a spell, and its evaluation."""
    *epochs, last = run_spell(model, momentum or {}, what, data=data, config=config, seed=3, **options)
    assert isinstance(last, SpellDone)
    return epochs, last


def linear(rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer


# Two images, (1, 0) of class 0 and (0, 1) of class 1. Equal rows of weights give both classes probability 1/2, so the
# gradient of the mean cross-entropy is ((-1/4, 1/4), (1/4, -1/4)); with a weight decay of 0.1 on the weights
# ((1, 2), (1, 2)) it is g = ((-0.15, 0.45), (0.35, -0.05)).
ROWS = [[1.0, 2.0], [1.0, 2.0]]
TWO = FakeData([[1.0, 0.0], [0.0, 1.0]], [0, 1])
GRADIENT = torch.tensor([[-0.15, 0.45], [0.35, -0.05]])
DECAYING = TrainConfig(epochs=1, prune_epoch=0, batch_size=2, momentum=0.9, nesterov=True, weight_decay=0.1)
PLAIN = TrainConfig(epochs=1, prune_epoch=0, batch_size=2, momentum=0.0, nesterov=False, weight_decay=0.0)


def test_first_step_of_sgd_with_nesterov_momentum_and_weight_decay():
    # The buffer starts as g, the step is g + 0.9 g, the weights lose 0.5 of it.
    (epoch,), _ = train(linear(ROWS), TWO, spell(0.5), config=DECAYING)
    torch.testing.assert_close(epoch.tensors["weight"], torch.tensor([[1.1425, 1.5725], [0.6675, 2.0475]]))
    torch.testing.assert_close(epoch.momentum["weight"], GRADIENT)
    assert epoch.loss == pytest.approx(math.log(2), abs=1e-6)
    assert (epoch.top1, epoch.images, epoch.position, epoch.plan.epoch) == (0.5, 2, 0, 7)


def test_step_with_the_momentum_of_the_epoch_before():
    # Buffer 0.9 v + g, step g + 0.9 of the buffer.
    before = {"weight": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}
    (epoch,), _ = train(linear(ROWS), TWO, spell(0.5), momentum=before, config=DECAYING)
    torch.testing.assert_close(epoch.momentum["weight"], torch.tensor([[0.75, 0.45], [0.35, -0.05]]))
    torch.testing.assert_close(epoch.tensors["weight"], torch.tensor([[0.7375, 1.5725], [0.6675, 2.0475]]))
    assert torch.equal(before["weight"], torch.tensor([[1.0, 0.0], [0.0, 0.0]]))  # a copy was trained on


@pytest.mark.parametrize("rate", [0.5, 0.125])
def test_learning_rate_of_the_epoch_is_the_one_used(rate):
    (first, second), _ = train(linear(ROWS), TWO, spell(rate, 0.0), config=PLAIN)
    gradient = torch.tensor([[-0.25, 0.25], [0.25, -0.25]])
    torch.testing.assert_close(first.tensors["weight"], torch.tensor(ROWS) - rate * gradient)
    assert torch.equal(second.tensors["weight"], first.tensors["weight"])
    assert [epoch.plan.learning_rate for epoch in (first, second)] == [rate, 0.0]


def test_an_epochs_tensors_are_not_changed_by_the_next_epoch():
    model = linear(ROWS)
    running = run_spell(model, {}, spell(0.5, 0.5), data=TWO, config=DECAYING, seed=3)
    first = next(running)
    kept = {name: first.tensors[name].clone() for name in first.tensors}, first.momentum["weight"].clone()
    second = next(running)
    assert torch.equal(first.tensors["weight"], kept[0]["weight"]) and torch.equal(first.momentum["weight"], kept[1])
    assert not torch.equal(second.tensors["weight"], first.tensors["weight"])


def test_evaluation_by_hand():
    # The network hands its input on, so the images are the logits. Six classes: the least of them is not in the top 5.
    logits = [[3.0, 2, 1, 0, -1, -2], [3.0, 2, 1, 0, -1, -2], [3.0, 2, 1, 0, -1, -2], [0.0, 0, 0, 0, 0, 5]]
    metrics = evaluate(nn.Identity(), FakeData(logits, [0, 4, 5, 5]))
    total = math.log(sum(math.exp(value) for value in logits[0]))
    alone = math.log(5 + math.exp(5))
    assert metrics.loss == pytest.approx(((total - 3) + (total + 1) + (total + 2) + (alone - 5)) / 4, rel=1e-6)
    assert (metrics.top1, metrics.top5, metrics.images) == (2 / 4, 3 / 4, 4)


def test_top_5_of_fewer_than_5_classes_is_certain():
    metrics = evaluate(nn.Identity(), FakeData([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], [0, 0]))
    assert (metrics.top1, metrics.top5, metrics.images) == (0.5, 1.0, 2)


def test_a_spell_without_epochs_only_evaluates():
    model = nn.Sequential(nn.Dropout(0.9), linear(ROWS))
    epochs, done = train(model, TWO, spell())
    assert epochs == [] and done.metrics.loss == pytest.approx(math.log(2), rel=1e-6)
    assert torch.equal(model[1].weight, torch.tensor(ROWS))


@pytest.mark.parametrize(
    ("scale", "rates", "message"),
    [
        # Weights of about 1e37 are finite still; times 1e3 they are not.
        (1e3, (0.1, 1e34, 0.1), r"training loss of epoch 9 \(learning rate 0\.1\) is not finite"),
        (1, (0.1, math.inf), r"after epoch 8 \(learning rate inf\) 1 tensors are not finite: weight"),
    ],
)
def test_training_that_is_not_finite_names_the_epoch(scale, rates, message):
    data = FakeData([[scale, 0.0], [0.0, scale]], [0, 1])
    seen = []
    with pytest.raises(TrainingError, match=message):
        for epoch in run_spell(linear(ROWS), {}, spell(*rates), data=data, config=DECAYING, seed=3):
            seen.append(epoch.position)
    assert seen == list(range(len(rates) - 1))


class Recording(nn.Linear):
    """A layer that keeps the dropout mask it drew; without it the weights have no gradient but zero."""

    def forward(self, x):
        if self.training:
            self.mask = functional.dropout(torch.ones(256), 0.5)
        return super().forward(x)


def mask_of(data_epoch, rank=0, scramble=0):
    torch.manual_seed(scramble)
    model = Recording(2, 2)
    data = FakeData(TWO.images.tolist() * 2, [0, 1, 0, 1], rank, 2)
    train(model, data, spell(0.1, first=data_epoch), config=dataclasses.replace(DECAYING, batch_size=4))
    return model.mask


def test_dropout_is_decided_by_the_epoch_and_the_rank_not_by_what_was_drawn_before():
    assert torch.equal(mask_of(5), mask_of(5, scramble=1))
    assert not torch.equal(mask_of(5), mask_of(6))
    assert not torch.equal(mask_of(5), mask_of(5, rank=1))


def make_folder(root, junk=()):
    """8 x 8 pictures; the files named in `junk` are cut short."""
    write_pictures(root, side=8, train=TRAIN_IMAGES, test=TEST_IMAGES)
    for name in junk:
        (root / name).write_bytes((root / name).read_bytes()[:60])
    return root


def folder_config(root, loader="torchvision"):
    return DataConfig(path=str(root), format="folder", image_size=8, eval_resize=8, threads=1, loader=loader)


def opened(config, rank=0, world=1, excluded=(), batch_size=8):
    return SpellData(config, batch_size=batch_size, seed=3, device=CPU, rank=rank, world=world, excluded=excluded)


def small_network(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *more, nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))


def with_batchnorm():
    return small_network(nn.BatchNorm2d(4), nn.Dropout(0.3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


def run_alone(config, what, model, momentum=None):
    data = opened(config, excluded=what.excluded)
    try:
        return train(model, data, what, momentum=momentum)
    finally:
        data.close()


def one_of_two(rank, root, out):
    """One of two ranks under DistributedDataParallel; the other is in another process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=200)
    )
    data = opened(folder_config(root), rank, 2)
    try:
        distributed = {"wrap": nn.parallel.DistributedDataParallel}
        result = train(small_network(), data, spell(0.1, 0.05), **distributed)
        torch.save((*result, train(with_batchnorm(), data, spell(0.1), **distributed)), f"{out}/{rank}.pt")
    finally:
        data.close()
        dist.destroy_process_group()


def second_of_two(_, root, out):
    one_of_two(1, root, out)


def test_two_ranks_train_and_measure_what_one_does(folder, tmp_path):
    other = mp.spawn(second_of_two, (str(folder), str(tmp_path)), nprocs=1, join=False)
    one_of_two(0, str(folder), str(tmp_path))
    while not other.join():
        pass
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    epochs, done = run_alone(folder_config(folder), spell(0.1, 0.05), small_network())
    for their_epochs, their_done, _ in ranks:
        assert len(their_epochs) == len(epochs) == 2
        for theirs, ours in zip(their_epochs, epochs, strict=True):
            assert theirs.tensors.keys() == ours.tensors.keys()
            for name, tensor in ours.tensors.items():
                torch.testing.assert_close(theirs.tensors[name], tensor, rtol=0, atol=1e-6)
                torch.testing.assert_close(theirs.momentum[name], ours.momentum[name], rtol=0, atol=1e-6)
            assert (theirs.images, theirs.top1) == (ours.images, ours.top1)
            assert theirs.loss == pytest.approx(ours.loss, abs=1e-6)
        assert their_done.metrics.images == done.metrics.images == TEST_IMAGES
        assert (their_done.metrics.top1, their_done.metrics.top5) == (done.metrics.top1, 1.0)
        assert their_done.metrics.loss == pytest.approx(done.metrics.loss, abs=1e-6)
    for one, other in zip(*(result[0] for result in ranks), strict=True):
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    # BatchNorm's statistics are each rank's own until they are agreed upon: what is measured must be what is saved.
    ((one,), measured), ((other,), _) = (result[2] for result in ranks)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    saved = with_batchnorm()
    saved.load_state_dict(one.tensors)
    _, alone = run_alone(folder_config(folder), spell(), saved)
    assert alone.metrics.loss == pytest.approx(measured.metrics.loss, rel=1e-6)
    assert alone.metrics.top1 == measured.metrics.top1


@pytest.mark.parametrize("done", [1, 2])
def test_a_spell_that_was_cut_off_ends_in_the_same_weights(folder, done):
    config, rates = folder_config(folder), (0.1, 0.1, 0.02)
    whole, measured = run_alone(config, spell(*rates), with_batchnorm())
    last = whole[done - 1]
    resumed = with_batchnorm()
    resumed.load_state_dict(last.tensors)
    torch.manual_seed(99)
    rest, again = run_alone(config, spell(*rates, done=done), resumed, last.momentum)
    assert [epoch.position for epoch in rest] == list(range(done, 3))
    for ours, theirs in zip(rest, whole[done:], strict=True):
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)
        assert all(torch.equal(ours.momentum[name], theirs.momentum[name]) for name in theirs.momentum)
        assert (ours.loss, ours.top1, ours.images) == (theirs.loss, theirs.top1, TRAIN_IMAGES)
    assert again.metrics == measured.metrics


def test_without_the_momentum_a_spell_goes_on_differently(folder):
    config = folder_config(folder)
    whole, _ = run_alone(config, spell(0.1, 0.1), with_batchnorm())
    resumed = with_batchnorm()
    resumed.load_state_dict(whole[0].tensors)
    (last,), _ = run_alone(config, spell(0.1, 0.1, done=1), resumed)
    assert not torch.equal(last.tensors["0.weight"], whole[1].tensors["0.weight"])


def test_training_learns(folder):
    epochs, done = run_alone(folder_config(folder), spell(*[0.02] * 8), small_network())
    assert epochs[-1].loss < epochs[0].loss / 2
    assert done.metrics.top1 > 0.9


@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_unreadable_images_are_left_out_and_told_once(tmp_path, loader):
    bad, bad_test = "train/a/003.png", "val/b/004.png"
    config = folder_config(make_folder(tmp_path, junk=(bad, bad_test)), loader)
    epochs, done = run_alone(config, spell(0.01, 0.01), small_network())
    assert [epoch.unreadable for epoch in epochs] == [(bad,), ()]
    assert [epoch.images for epoch in epochs] == [TRAIN_IMAGES - 1] * 2
    assert done.unreadable == (bad_test,) and done.metrics.images == TEST_IMAGES - 1
    # One who knows of them from the start tells nothing, and from then on trains the same.
    known, _ = run_alone(config, spell(0.01, 0.01, excluded=(bad, bad_test)), small_network())
    assert [epoch.unreadable for epoch in known] == [(), ()]
    assert torch.equal(known[1].tensors["0.weight"], epochs[1].tensors["0.weight"])


@pytest.mark.parametrize("position", [0, 5, 10])
def test_a_batch_of_which_nothing_can_be_read_is_an_error_that_names_the_epoch(tmp_path, position):
    config = dataclasses.replace(folder_config(make_folder(tmp_path)), max_unreadable=TRAIN_IMAGES)
    lost = epoch_batches(TRAIN_IMAGES, batch_size=2, seed=3, epoch=0)[position]
    data = opened(config, batch_size=2)
    try:
        files = sorted((tmp_path / "train").glob("*/*.png"))
        for index in lost:
            files[index].write_bytes(b"junk")
        with pytest.raises(TrainingError, match="epoch 7: not one image of a batch of 2 could be read"):
            train(small_network(), data, spell(0.01), config=dataclasses.replace(CONFIG, batch_size=2))
    finally:
        data.close()


def test_no_test_image_that_can_be_read_is_an_error(tmp_path):
    make_folder(tmp_path)
    for path in (tmp_path / "val").glob("*/*.png"):
        path.write_bytes(b"junk")
    data = opened(folder_config(tmp_path))
    try:
        with pytest.raises(TrainingError, match="not one test image could be read"):
            evaluate(small_network(), data)
    finally:
        data.close()
