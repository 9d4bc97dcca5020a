"""Losses and metrics of the user's own: what is computed of them, and what is refused before a run."""

import copy
import functools

import numpy as np
import own_examples
import pytest
import torch
from own_examples import SHAPE, bce, bce_of_model, config_of, network, right
from torch import nn
from torch.nn import functional

from laasp_ray.config import DataConfig, TrainConfig
from laasp_ray.errors import ConfigError, DataError
from laasp_ray.search.evaluate import CalibrationSet, ExampleSet
from laasp_ray.tasks import CLASSIFICATION, Mean, ModelLossTask, OutputLossTask, OwnData, TopK, task_of
from laasp_ray.tasks.check import check_task
from laasp_ray.train.data import EvaluationData
from laasp_ray.train.trial import try_step

TRAIN = TrainConfig(epochs=1, prune_epoch=0)
DATA = OwnData(own_examples.data)
OUTPUTS = torch.tensor([[0.0, 0.0], [np.log(3.0), 0.0]])
TARGETS = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
LOSSES = [np.log(2), (np.log(4 / 3) + np.log(2)) / 2]
"""A sigmoid of 0 is 1/2, of log 3 it is 3/4."""


def test_losses_and_their_sum_in_training():
    task = OutputLossTask(loss=bce)
    assert task.losses_of(OUTPUTS.double(), TARGETS).tolist() == pytest.approx(LOSSES, rel=1e-6)
    total, hits = task.training_sum(OUTPUTS, TARGETS, 2, TRAIN)
    assert float(total) == pytest.approx(sum(LOSSES)) and int(hits) == 0


def test_a_loss_that_runs_the_network_gives_the_same():
    model, (inputs, targets) = network().eval(), OutputLossTask(DATA, loss=bce).trial(SHAPE)
    outside, inside = OutputLossTask(loss=bce), ModelLossTask(loss=bce_of_model)
    assert torch.equal(inside.losses(model, inputs, targets), outside.losses(model, inputs, targets))
    assert torch.equal(inside.trained(model)(inputs, targets), bce(model(inputs), targets))
    assert outside.trained(model) is model


def test_metrics_come_from_sums_over_batches():
    """Shares of right targets: 1/2 and 1 in the first batch, 0 in the second: 1/2 over all, not the mean of means."""
    outputs = [torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[-1.0, 1.0]])]
    targets = [torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]])]
    task = OutputLossTask(loss=lambda outputs, targets: outputs.sum(1), metrics_by_name={"right": Mean(right)})
    sums = sum(task.sums(nn.Identity(), *pair) for pair in zip(outputs, targets, strict=True))
    assert sums.tolist() == [2.0, 1.5, 3.0]
    metrics = task.metrics(sums.tolist(), 3)
    assert (metrics.loss, metrics.values, metrics.images, metrics.top1) == (2 / 3, {"right": 0.5}, 3, None)
    assert metrics.primary == ("right", 0.5) and metrics.score == 0.5


def test_the_first_metric_decides_and_without_any_the_loss():
    lower = OutputLossTask(loss=bce, metrics_by_name={"wrong": own_examples.WRONG, "right": Mean(right)})
    assert lower.metrics([2.0, 1.0, 4.0, 3.0, 4.0], 4).score == -0.25
    plain = OutputLossTask(loss=bce).metrics([2.0], 4)
    assert (plain.primary, plain.score, plain.named) == (("loss", 0.5), -0.5, {})
    classes = CLASSIFICATION.metrics([2.0, 1.0, 3.0], 4)
    assert (classes.primary, classes.score, classes.named) == (("top1", 0.25), 0.25, {"top1": 0.25, "top5": 0.75})


def test_topk_is_the_share_of_labels_among_the_highest():
    outputs, labels = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), torch.tensor([1, 0])
    assert [TopK(k).value(TopK(k).sums(outputs, labels)) for k in (1, 2, 5)] == [0.0, 0.5, 1.0]


def test_distillation_mixes_what_the_loss_defines():
    class Squared:
        def __call__(self, outputs, targets):
            return (outputs[:, 0] - targets) ** 2

        def distillation(self, outputs, teacher, targets):
            return (outputs[:, 0] - teacher[:, 0]).abs()

    config = TrainConfig(epochs=1, prune_epoch=0, distill=0.25)
    task = OutputLossTask(loss=Squared())
    task.check_settings(config)
    total, _ = task.training_sum(
        torch.tensor([[3.0], [1.0]]), torch.tensor([1.0, 1.0]), 2, config, torch.tensor([[1.0], [5.0]])
    )
    assert float(total) == 0.75 * (4 + 0) + 0.25 * (2 + 4)


@pytest.mark.parametrize(
    ("task", "config", "message"),
    [
        (OutputLossTask(loss=bce), {"distill": 0.5}, r"train\.distill is 0\.5, but the loss bce does not say how"),
        (ModelLossTask(loss=bce_of_model), {"distill": 0.5}, r"the loss bce_of_model runs the network itself"),
        (
            OutputLossTask(loss=bce),
            {"label_smoothing": 0.1},
            r"train\.label_smoothing is 0\.1, which is of the built-in",
        ),
    ],
)
def test_settings_that_do_not_fit_the_loss(task, config, message):
    with pytest.raises(ConfigError, match=message):
        task.check_settings(TrainConfig(epochs=1, prune_epoch=0, **config))


def mean_of_batch(outputs, targets):
    return functional.binary_cross_entropy_with_logits(outputs, targets)


def one_per_target(outputs, targets):
    return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none")


def not_a_number(outputs, targets):
    return bce(outputs, targets) * float("nan")


def over_batch(outputs, targets):
    return bce(outputs, targets) / len(outputs)


def whole_numbers(outputs, targets):
    return outputs.argmax(1)


def fails(outputs, targets):
    return outputs @ targets


def a_list(outputs, targets):
    return bce(outputs, targets).tolist()


def trains(model, batch):
    model.train()
    try:
        return bce_of_model(model, batch)
    finally:
        model.eval()


def leaves_training(model, batch):
    return bce_of_model(model.train(), batch)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            mean_of_batch,
            r"the loss mean_of_batch gave a tensor of shape \(\) .* floats of shape \(2,\).*reduction='none'",
        ),
        (one_per_target, r"one_per_target gave a tensor of shape \(2, 3\).*values\.flatten\(1\)\.mean\(1\)"),
        (not_a_number, r"not_a_number gave \[nan, nan\] for the first 2 training examples, must be finite"),
        (over_batch, r"over_batch gave .* for training example 0 in a batch of 2, .* for it alone"),
        (whole_numbers, r"type torch\.int64, must give floats of shape \(2,\)"),
        (a_list, r"the loss a_list gave a list, must give a tensor of shape \(2,\)"),
        (fails, r"the loss fails fails on the first 2 examples \(RuntimeError: "),
        (trains, r"the loss trains changes the network \(1\.running_mean.* in eval mode"),
        (leaves_training, r"the loss leaves_training (changes|leaves) the network"),
    ],
)
def test_a_loss_that_cannot_be_used(loss, message, tmp_path):
    task = task_of(config_of(tmp_path, train__loss="", train__metrics={}), loss=loss)
    with pytest.raises(ConfigError, match=message):
        check_task(task, network(), SHAPE)


def test_what_is_right_passes_and_the_network_is_untouched(tmp_path):
    model = network()
    before = copy.deepcopy(model.state_dict())
    for loss in (bce, bce_of_model):
        check_task(task_of(config_of(tmp_path, train__loss=""), loss=loss), model, SHAPE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class OfWrongWidth:
    higher_is_better, width = True, 2

    def sums(self, outputs, targets):
        return torch.zeros(3)

    def value(self, sums):
        return 0.0


class WithoutValue(OfWrongWidth):
    def sums(self, outputs, targets):
        return torch.zeros(2)

    def value(self, sums):
        return 1 // int(sums[0])


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (fails, r"the metric 'mine' failed: RuntimeError"),
        (one_per_target, r"the metric 'mine' failed: ValueError: a function as metric gave shape \(2, 3\)"),
        (OfWrongWidth, r"the metric 'mine' gave sums of shape \(3,\), must give a tensor \(2,\)"),
        (WithoutValue(), r"the metric 'mine' failed on the sums \[0\.0, 0\.0\]: ZeroDivisionError"),
        (7, r"the metric 'mine' is a int, must be a function"),
        ("no_such_module:f", r"train\.metrics\.mine 'no_such_module:f' cannot be imported"),
    ],
)
def test_a_metric_that_fails(metric, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        check_task(task_of(config_of(tmp_path), metrics={"mine": metric}), network(), SHAPE)


def items(values):
    """A factory of the items `values`, for both splits."""

    class Items:
        def __len__(self):
            return len(values)

        def __getitem__(self, index):
            return values[index]

    return lambda split: Items()


PLAIN = (torch.zeros(SHAPE), torch.zeros(3))


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (items([]), DataError, r"gave no train examples: its data set has length 0"),
        (items([PLAIN, (torch.zeros(2, 6, 7), torch.zeros(3))]), DataError, r"examples 0, 1 cannot be collated"),
        (items([(*PLAIN, 1)] * 2), DataError, r"are collated to a list of 3, must be a pair \(inputs, targets\)"),
        (items([torch.zeros(SHAPE)] * 3), DataError, r"are collated to a Tensor, must be a pair"),
        (items([(torch.zeros(2, 8, 8), torch.zeros(3))] * 2), ConfigError, r"\(2, 2, 8, 8\).*model\.input_shape is"),
        (items([(torch.zeros(SHAPE, dtype=torch.uint8), torch.zeros(3))] * 2), ConfigError, r"torch\.uint8, must"),
        (items([({"a": torch.zeros(SHAPE)}, 0)] * 2), DataError, r"inputs that are a dict, must be one tensor"),
        (lambda split: 3, ConfigError, r"gave a int for the train data, which has no __len__ and no __getitem__"),
        (lambda split: 1 // 0, ConfigError, r"failed for the train data: ZeroDivisionError"),
        (lambda: None, ConfigError, r"failed for the train data: TypeError"),
    ],
)
def test_data_that_cannot_be_used(factory, error, message, tmp_path):
    task = task_of(config_of(tmp_path, data__factory="given"), data=factory)
    with pytest.raises(error, match=message):
        check_task(task, network(), SHAPE)


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (
            lambda part: ({"a": part[0][0], "b": part[0][0]}, 0),
            r"train examples 0, 1 are collated to inputs that are a",
        ),
        (
            lambda part: ((torch.zeros(len(part), 3),) * 2, 0),
            r"examples 0 are .* to 2 inputs \(a tuple\), must be 1: one",
        ),
        (lambda part: (torch.tensor(1.0), 0), r"collated to 0 inputs \(a tensor\), must be 2"),
        (
            lambda part: (iter(part), 0),
            r"inputs that are a list_iterator, must be one tensor .* or, for a loss of \(mo",
        ),
    ],
)
def test_inputs_of_several_parts_are_refused_for_every_loss(collate, message):
    """Two tensors pass for two examples, not for each alone; a mapping has as many keys as there are."""
    own = OwnData(items([PLAIN] * 3), collate=collate)
    with pytest.raises(DataError, match=message):
        check_task(ModelLossTask(own, loss=lambda model, batch: torch.zeros(len(batch[0]))), network(), SHAPE)


def test_a_list_with_an_item_for_each_example_is_an_input():
    own = OwnData(items([PLAIN] * 3), collate=lambda part: tuple(zip(*part, strict=True)))
    check_task(ModelLossTask(own, loss=lambda model, batch: model(torch.stack(batch[0])).sum(1)), network(), SHAPE)


@pytest.mark.parametrize("name", ["loss", "top1", "top5", "flops_reduction", "best_right", "best_"])
def test_names_of_the_run_s_own_figures_are_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=rf"the metric '{name}' has a name of the run's own .*such as 'my_{name}'"):
        task_of(config_of(tmp_path), metrics={"right": right, name: right})


META = torch.device("meta")


class Weighted(nn.Module):
    """A loss, or the function of a metric, with a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(3))

    def forward(self, outputs, targets):
        return ((outputs - targets) * self.weight).mean(1)


class WeightedMetric(Weighted):
    higher_is_better, width = True, 1

    def sums(self, outputs, targets):
        return self(outputs, targets).sum().reshape(1)

    def value(self, sums):
        return float(sums)


def with_modules():
    metrics = {"mean": Mean(Weighted(), higher_is_better=False), "own": WeightedMetric(), "right": Mean(right)}
    return OutputLossTask(DATA, loss=Weighted(), metrics_by_name=metrics)


def test_modules_among_loss_and_metrics_move_to_the_device_as_copies():
    task = with_modules()
    moved = task.to(META)
    mean, own, plain = moved.metrics_by_name.values()
    assert [part.weight.device for part in (moved.loss, mean.function, own)] == [META] * 3
    assert (mean.higher_is_better, plain, moved.data) == (False, task.metrics_by_name["right"], DATA)
    assert task.loss.weight.device.type == "cpu" and task.to(torch.device("cpu")).loss is task.loss
    assert moved.sums(nn.Identity(), *torch.zeros(2, 2, 3, device=META)).device == META
    assert CLASSIFICATION.to(META) is CLASSIFICATION


def test_everything_that_measures_on_a_device_has_the_task_there():
    """Training and evaluation, the calibration set of own examples and of images, and the step that is tried."""
    task = with_modules()
    evaluation = EvaluationData(DATA.open("test"), DataConfig(), batch_size=2, seed=0, device=META, task=task)
    images = CalibrationSet(torch.zeros(2, *SHAPE), torch.zeros(2).long(), 2, task=task)
    examples = ExampleSet([DATA.open("train").example(0, 0, 0)], 1, task)
    for found in (evaluation, images.to(META), examples.to(META)):
        assert found.task.loss.weight.device == META
    tried = try_step(network().to(META), SHAPE, TRAIN, task)
    assert "device" not in tried.fault, tried.fault  # such tensors have no values: the step ends after the loss


def test_a_broken_example_is_named(tmp_path):
    class Broken(own_examples.Noise):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("no such file")
            return super().__getitem__(index)

    with pytest.raises(DataError, match=r"example 1 of the train data cannot be read \(OSError: no such file\)"):
        check_task(task_of(config_of(tmp_path, data__factory="given"), data=Broken), network(), SHAPE)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {"loss": bce}, r"train\.loss is 'own_examples:bce', and prune is given loss, too"),
        ({}, {"data": own_examples.data}, r"data\.factory is 'own_examples:data', and prune is given data, too"),
        ({"train__loss": "given"}, {}, r"train\.loss is 'given': .* call prune\(config, \.\.\., loss=\.\.\.\)"),
        ({"data__factory": "given"}, {}, r"data\.factory is 'given'"),
        ({"train__loss": "own_examples:none"}, {}, r"train\.loss 'own_examples:none' cannot be imported"),
        ({"train__loss": ""}, {}, r"metrics of your own \(right, wrong\) come with a loss of your own"),
        ({"train__loss": ""}, {"loss": lambda outputs: outputs}, r"cannot be called with two arguments"),
        ({"train__loss": ""}, {"loss": 3}, r"the argument loss is a int, must be a function"),
        ({"data__factory": "given"}, {"data": [1, 2]}, r"the argument data is a list, must be a factory"),
    ],
)
def test_what_is_given_twice_or_not_at_all(changes, given, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        task_of(config_of(tmp_path, **changes), **given)


def test_which_losses_run_the_network(tmp_path):
    config = config_of(tmp_path, train__loss="")

    class Module(nn.Module):
        def forward(self, model, batch):
            return bce_of_model(model, batch)

    losses = {bce: False, bce_of_model: True, Module(): True, functools.partial(bce): False}
    assert [task_of(config, loss=loss).runs_model for loss in losses] == list(losses.values())
    assert task_of(config_of(tmp_path, train__loss="own_examples:bce_of_model")).runs_model


def test_own_data_without_a_loss_is_classification(tmp_path):
    config = config_of(tmp_path, train__loss="", train__metrics={}, data__factory="given")
    labels = items([(torch.zeros(SHAPE), 0), (torch.zeros(SHAPE), 2)])
    check_task(task_of(config, data=labels), network(), SHAPE)
    with pytest.raises(ConfigError, match=r"a target of the own data set is 3, but the network has 3 outputs"):
        check_task(task_of(config, data=items([(torch.zeros(SHAPE), 3)] * 2)), network(), SHAPE)
    with pytest.raises(ConfigError, match=r"targets of the own data set are torch\.float32 of shape \(2, 3\)"):
        check_task(task_of(config, data=items([PLAIN] * 2)), network(), SHAPE)
