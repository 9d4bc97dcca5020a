"""The test images between the epochs of a training phase: after which, on which weights, and that training does not
notice."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from training_by_hand import DECAYING, PLAIN, ROWS, TWO, FakeData, InMemory, linear, train, training_phase

from laasp_ray.data.ordering import epoch_batches
from laasp_ray.pruning.sparsity.groups import pack_mask
from laasp_ray.train import loop
from laasp_ray.train.loop import run_training_phase


def cross_entropy(difference):
    """Of two classes, of which the true one's logit is so much greater."""
    return math.log(1 + math.exp(-difference))


def measured_after(every, what, done=0):
    """The positions of the epochs of a training phase (schedule's epochs 7, 8, ...) that have test metrics."""
    what = dataclasses.replace(what, done=done)
    epochs, _ = train(linear(ROWS), TWO, what, config=dataclasses.replace(PLAIN, test_every=every))
    assert all((epoch.metrics is None) == (epoch.test_seconds == 0) for epoch in epochs)
    return [epoch.position for epoch in epochs if epoch.metrics is not None]


@pytest.mark.parametrize(
    ("every", "positions"),
    [(0, []), (1, [0, 1, 2, 3]), (2, [0, 2]), (3, [1]), (4, [0]), (6, []), (12, [])],
)
def test_it_goes_by_the_schedules_epoch_and_the_last_one_is_left_to_the_training_phases_end(every, positions):
    what = training_phase(0.1, 0.1, 0.1, 0.1, 0.1)  # epochs 7 to 11: the 8th to the 12th
    assert measured_after(every, what) == positions
    # A training phase that goes on in the middle tests the same epochs.
    assert measured_after(every, what, done=1) == [position for position in positions if position > 0]
    assert measured_after(every, dataclasses.replace(what, phase="final")) == positions
    assert measured_after(every, dataclasses.replace(what, phase="fine-tune")) == []


def test_metrics_after_each_epoch_by_hand():
    # The first step brings the true class 1/4 above the other; the second adds a half of the other's probability.
    epochs, done = train(linear(ROWS), TWO, training_phase(0.5, 0.5, 0.0), config=PLAIN)
    second = 0.25 + 0.5 / (1 + math.exp(0.25))
    for metrics, above in ((epochs[0].metrics, 0.25), (epochs[1].metrics, second), (done.metrics, second)):
        assert metrics.loss == pytest.approx(cross_entropy(above), rel=1e-6)
        assert (metrics.top1, metrics.top5, metrics.images) == (1.0, 1.0, 2)
    assert epochs[2].metrics is None


def test_of_averaged_weights_the_average_is_tested():
    # As above; after one step the average has (1 - 2/11) of its way.
    epochs, _ = train(linear(ROWS), TWO, training_phase(0.5, 0.5), config=dataclasses.replace(PLAIN, ema=0.9))
    assert epochs[0].metrics.loss == pytest.approx(cross_entropy(9 / 11 * 0.25), rel=1e-6)


def data_of_thirty():
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(30) % 3
    images = torch.randn(30, 6, generator=generator) + nn.functional.one_hot(labels, 6)
    return FakeData(images.tolist(), labels.tolist())


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 3))


KEPT = torch.arange(24).reshape(3, 8) % 4 != 1


def trained(every, ema, model=None):
    """Three epochs with dropout, BatchNorm, momentum and a mask."""
    what = dataclasses.replace(training_phase(0.1, 0.1, 0.05), phase="final", masks={"4.weight": pack_mask(KEPT)})
    config = dataclasses.replace(DECAYING, batch_size=10, ema=ema, test_every=every)
    return train(model or network(), data_of_thirty(), what, config=config)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_training_does_not_notice(ema):
    plain_model, tested_model = network(), network()
    (plain, end), (checked, checked_end) = trained(0, ema, plain_model), trained(1, ema, tested_model)
    assert [epoch.metrics is None for epoch in checked] == [False, False, True]
    for ours, theirs in zip(checked, plain, strict=True):
        for tensors, expected in ((ours.tensors, theirs.tensors), (ours.optimizer_state, theirs.optimizer_state)):
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert (ours.loss, ours.top1, ours.images) == (theirs.loss, theirs.top1, 30)
        assert (ours.tensors["4.weight"][~KEPT] == 0).all()
    assert checked_end.metrics == end.metrics
    for name, tensor in plain_model.state_dict().items():
        assert torch.equal(tested_model.state_dict()[name], tensor)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_tested_are_the_weights_that_the_epoch_yields(ema):
    epochs, _ = trained(1, ema)
    for epoch in epochs[:2]:
        again = network()
        again.load_state_dict(epoch.tensors)
        assert train(again, data_of_thirty(), training_phase())[1].metrics == epoch.metrics
        if ema:  # and not those that are averaged
            again.load_state_dict({name: epoch.optimizer_state[f"weights/{name}"] for name in epoch.tensors})
            assert train(again, data_of_thirty(), training_phase())[1].metrics != epoch.metrics


class Slow(InMemory):
    """Every pass over the images takes so many seconds of a clock set by hand."""

    def __init__(self, data, clock, seconds):
        super().__init__(data.images, data.labels)
        self.clock, self.seconds = clock, seconds

    def epoch(self, batches, epoch=0):
        self.clock[0] += self.seconds
        return super().epoch(batches, epoch)


def test_the_seconds_of_the_test_are_not_those_of_the_epoch(monkeypatch):
    clock, data = [0.0], FakeData(TWO.images.tolist(), TWO.labels.tolist())
    data.train_loader, data.test_loader = Slow(data, clock, 8.0), Slow(data, clock, 0.5)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    (first, last), done = train(linear(ROWS), data, training_phase(0.1, 0.1), config=PLAIN)
    assert (first.seconds, first.test_seconds, last.seconds, last.test_seconds) == (8.0, 0.5, 8.0, 0.0)
    assert done.seconds == 0.5


def test_the_network_is_in_training_again_in_the_next_epoch():
    modes = []

    class Noting(nn.Linear):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    batches = len(epoch_batches(2, batch_size=2, seed=3, epoch=0))
    list(run_training_phase(Noting(2, 2), {}, training_phase(0.1, 0.1), data=TWO, config=PLAIN, seed=3))
    assert modes == ([True] * batches + [False] * 2) * 2  # two test batches of one image
