"""A run with data, a loss and metrics of the user's own on Ray's workers, against the same one in this process."""

import functools
import threading

import pytest
import torch
from fakes import Silent
from own_examples import WRONG, config_of, data
from torch import nn
from whole_runs import read_events_of

from laasp_ray import prune
from laasp_ray.errors import ConfigError
from laasp_ray.run.events import EpochDone, IterationDone
from laasp_ray.tasks import OwnData

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def network():
    """Without BatchNorm, whose statistics are those of a worker's own examples: two workers train what one does."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def given():
    """Objects that workers cannot import: they are sent by value."""
    factor = 2.0

    def loss(model, batch):
        inputs, targets = batch
        return factor * ((model(inputs).sigmoid() - targets) ** 2).mean(1)

    def pair(examples):
        inputs, targets = zip(*examples, strict=True)
        return torch.stack(inputs), factor * torch.stack(targets) / 2

    return {
        "data": OwnData(functools.partial(data, count=24), collate=pair),
        "loss": loss,
        "metrics": {"wrong": WRONG, "low": lambda outputs, targets: (outputs < 0).float().mean(1)},
    }


def test_two_workers_do_what_this_process_does(session, tmp_path):
    runs = []
    for name, distributed in (("here", False), ("there", True)):
        config = config_of(
            tmp_path / name, train__loss="", train__metrics={}, data__factory="given", cluster__workers=2
        )
        result = prune(config, network(), distributed=distributed, progress=Silent(), **given())
        events = read_events_of(config)
        decisions = [event.decision for event in events if isinstance(event, IterationDone)]
        epochs = [event.loss for event in events if isinstance(event, EpochDone)]
        runs.append((result.summary["metrics"], decisions, epochs))
    (metrics_here, here, epochs_here), (metrics_there, there, epochs_there) = runs
    assert [one.prunes for one in there] == [one.prunes for one in here]
    assert [one.loss for one in there] == pytest.approx([one.loss for one in here], rel=1e-4)
    assert epochs_there == pytest.approx(epochs_here, rel=1e-4)
    assert metrics_there["images"] == metrics_here["images"] == 10
    assert metrics_there["values"] == pytest.approx(metrics_here["values"])
    assert metrics_there["loss"] == pytest.approx(metrics_here["loss"], rel=1e-4)


class Locked:
    """A factory that cannot be pickled."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, split):
        return data(split)


def test_what_cannot_be_sent_to_workers_is_refused_before_anything_is_stored(tmp_path):
    config = config_of(tmp_path, data__factory="given")
    with pytest.raises(ConfigError, match=r"the data factory cannot be sent to workers \(TypeError: cannot pickle"):
        prune(config, network(), progress=Silent(), data=Locked())
    assert not read_events_of(config)
