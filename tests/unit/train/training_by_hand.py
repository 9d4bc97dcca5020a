"""Training phases on tensors, small enough to be worked out by hand."""

import torch
from torch import nn

from laasp_ray.config import TrainConfig
from laasp_ray.data.loaders.reading import Batch
from laasp_ray.tasks import CLASSIFICATION
from laasp_ray.train.loop import EpochPlan, PhaseResult, TrainingPhase, run_training_phase

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=1, prune_epoch=0, batch_size=8, weight_decay=1e-3)


class InMemory:
    """A loader over tensors that does not augment."""

    name = "in memory"
    in_background = True

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def epoch(self, batches, epoch=0):
        for indices in batches:
            if len(indices):
                yield Batch(self.images[indices], self.labels[indices], indices)


class FakeData:
    """What `run_training_phase` needs of a PhaseData; images of shape (n, features), the same for training and test."""

    device = CPU
    task = CLASSIFICATION

    def __init__(self, images, labels, rank=0, world=1):
        self.images, self.labels = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
        self.rank, self.world, self.parts, self.own_parts = rank, world, world, (rank,)
        self.train_images = self.test_images = len(labels)
        self.train_loader = self.test_loader = InMemory(self.images, self.labels)
        self.share = -(-len(labels) // 2)

    def take_unreadable(self):
        return ()


def training_phase(*rates, done=0, excluded=(), first=0):
    plans = tuple(EpochPlan(epoch=7 + i, data_epoch=first + i, learning_rate=rate) for i, rate in enumerate(rates))
    return TrainingPhase(number=0, phase="train", epochs=plans, done=done, excluded=excluded)


def train(model, data, what, *, optimizer_state=None, config=CONFIG, **options):
    """The epochs of a training phase, and its evaluation."""
    *epochs, last = run_training_phase(model, optimizer_state or {}, what, data=data, config=config, seed=3, **options)
    assert isinstance(last, PhaseResult)
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
