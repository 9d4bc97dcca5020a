"""`rank` with data and a loss of the user's own: losses by hand, the same as a run's, and what is refused."""

import dataclasses

import numpy as np
import own_examples
import pytest
import torch
from fakes import Silent
from own_examples import bce, bce_of_model, config_of, data, network
from torch import nn
from torch.utils.data import TensorDataset
from whole_runs import read_events_of

from laasp_ray import prune
from laasp_ray.errors import ConfigError, DataError
from laasp_ray.pruning.channels import plan_of
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.plan import apply_plan
from laasp_ray.run.events import IterationDone
from laasp_ray.search import rank
from laasp_ray.tasks import OwnData

FEW = {"criteria": ("l1",), "step": 0.1, "compensate": "off", "batch_size": 6}
EXAMPLES = [data("train", augment=False)[index] for index in range(24)]
INPUTS, TARGETS = (torch.stack(part) for part in zip(*EXAMPLES, strict=True))


def plain(split):
    return data(split, augment=False)


def loss_of_copy(entry):
    """The mean loss over all examples of a copy without the entry's filters."""
    pruned = network().eval()
    removal = PruningGraph(pruned, INPUTS[:1]).removal(entry.layer, entry.filters)
    apply_plan(pruned, plan_of(removal))
    with torch.no_grad():
        return float(bce(pruned(INPUTS), TARGETS).mean())


def figures(ranking):
    return [(entry.layer, entry.criterion, entry.filters) for entry in ranking], [entry.loss for entry in ranking]


def test_losses_are_those_of_pruned_copies():
    ranking = rank(network(), data=plain, loss=bce, **FEW)
    assert len(ranking) == 2 and [entry.images for entry in ranking] == [24, 24]
    assert [entry.loss for entry in ranking] == pytest.approx([loss_of_copy(entry) for entry in ranking], rel=1e-5)


def test_tensors_and_a_loss_that_runs_the_network_give_the_same():
    chosen, losses = figures(rank(network(), data=plain, loss=bce, **FEW))
    for given in (
        figures(rank(network(), INPUTS, TARGETS, loss=bce, **FEW)),
        figures(rank(network(), INPUTS, TARGETS, loss=bce_of_model, **FEW)),
        figures(rank(network(), data=OwnData(plain), loss=bce_of_model, **FEW)),
    ):
        assert given[0] == chosen and given[1] == pytest.approx(losses, rel=1e-5)


def test_prepare_and_targets_of_any_shape():
    doubled = figures(rank(network(), INPUTS / 2, TARGETS, loss=bce, prepare=lambda batch: 2 * batch, **FEW))
    assert doubled[1] == pytest.approx(figures(rank(network(), INPUTS, TARGETS, loss=bce, **FEW))[1], rel=1e-5)


def test_the_draw_is_that_of_a_run_of_the_seed(tmp_path):
    """The first iteration of a run whose training phase is empty chooses rank's first."""
    config = config_of(tmp_path, train__prune_epoch=0, prune__compensate="off", prune__criteria=("l1",))
    config = dataclasses.replace(config, seed=3)
    prune(config, network(), distributed=False, progress=Silent())
    first = next(event.decision for event in read_events_of(config) if isinstance(event, IterationDone))
    best = rank(network(), data=data, loss=bce, examples=16, seed=3, **FEW)[0]
    assert (best.layer, best.criterion, best.filters) == (first.layer, first.criterion, first.filters)
    assert best.loss == pytest.approx(first.loss, rel=1e-5) and best.images == 16


def listed(examples):
    """Inputs as a list, as a detector takes them."""
    return [picture for picture, _ in examples], torch.stack([target for _, target in examples])


def bce_of_list(model, batch):
    pictures, targets = batch
    return bce(model(torch.stack(pictures)), targets)


def test_inputs_that_are_no_tensor_need_their_shape():
    own = OwnData(plain, collate=listed)
    with pytest.raises(ConfigError, match=r"inputs of a batch are a list, .* give its shape, input_shape=\(C, H, W\)"):
        rank(network(), data=own, loss=bce_of_list, **FEW)
    ranking = rank(network(), data=own, loss=bce_of_list, input_shape=own_examples.SHAPE, **FEW)
    expected = figures(rank(network(), data=plain, loss=bce, **FEW))
    assert figures(ranking)[0] == expected[0] and figures(ranking)[1] == pytest.approx(expected[1], rel=1e-5)


def test_data_without_a_loss_are_classes():
    labels = TARGETS[:, 0].long()
    by_data = rank(network(), data=lambda split: TensorDataset(INPUTS, labels), **FEW)
    expected = figures(rank(network(), INPUTS, labels, **FEW))
    assert figures(by_data)[0] == expected[0] and figures(by_data)[1] == pytest.approx(expected[1], rel=1e-5)


def test_the_network_and_the_random_state_are_left_alone():
    model = network().train()
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    rank(model, data=data, loss=bce, **FEW)
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def over_batch(outputs, targets):
    return bce(outputs, targets) / len(outputs)


def mean(outputs, targets):
    return bce(outputs, targets).mean()


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ((), {}, r"rank is given neither images and labels nor data: give one of them"),
        ((INPUTS, TARGETS), {"data": plain, "loss": bce}, r"rank is given images and labels, and data too"),
        ((INPUTS,), {"loss": bce}, r"labels is a NoneType, must be a tensor"),
        ((INPUTS, TARGETS), {}, r"labels has shape \(24, 3\), must be \(n,\)"),
        ((), {"data": plain}, r"targets of the own data set are torch\.float32 of shape \(2, 3\), .*give a loss"),
        ((), {"data": plain, "loss": over_batch}, r"loss over_batch gave .* must not depend on the others"),
        ((INPUTS, TARGETS), {"loss": over_batch}, r"loss over_batch gave .* must not depend on the others"),
        ((), {"data": plain, "loss": mean}, r"loss mean gave a tensor of shape \(\) .*reduction='none'"),
        ((), {"data": 3, "loss": bce}, r"the argument data is a int, must be a factory"),
        ((), {"data": plain, "loss": "bce"}, r"the argument loss is a str, must be a function"),
        ((), {"data": plain, "loss": bce, "examples": 0}, r"examples is 0, must be a whole number, at least 1"),
        ((), {"data": plain, "loss": bce, "prepare": abs}, r"given prepare, which is of images, and data"),
        ((), {"data": plain, "loss": lambda outputs, targets: outputs @ targets}, r"<lambda> fails on the first 2"),
    ],
)
def test_what_does_not_fit_is_refused(given, changes, message):
    with pytest.raises(ConfigError, match=message):
        rank(network(), *given, **{**FEW, **changes})


def test_a_data_set_of_one_example_is_enough():
    ranking = rank(network(), data=lambda split: TensorDataset(INPUTS[:1], TARGETS[:1]), loss=bce, **FEW)
    assert ranking[0].images == 1 and np.isfinite(ranking[0].loss)


def test_an_example_that_cannot_be_read_is_named():
    class Broken(own_examples.Noise):
        def __getitem__(self, index):
            raise RuntimeError("no such file")

    with pytest.raises(DataError, match=r"example \d+ of the train data cannot be read \(RuntimeError: no such file\)"):
        rank(network(), data=Broken, loss=bce, **FEW)


def test_the_loss_may_be_a_module_with_weights():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, outputs, targets):
            return self.weight * bce(outputs, targets)

    doubled = figures(rank(network(), data=plain, loss=Weighted(), **FEW))[1]
    assert doubled == pytest.approx([2 * loss for loss in figures(rank(network(), data=plain, loss=bce, **FEW))[1]])
