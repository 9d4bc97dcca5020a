"""Label smoothing, distillation and the moving average of weights: steps by hand, and the same in plain torch."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from training_by_hand import PLAIN, ROWS, TWO, FakeData, linear, train, training_phase

from laasp_ray.data.ordering import epoch_batches
from laasp_ray.tasks.classification import training_loss
from laasp_ray.train.ema import MovingAverage

# Without any option the gradient of TWO's mean loss at ROWS is ((-1/4, 1/4), (1/4, -1/4)); the first column is that of
# the image of class 0, the second that of the image of class 1.


def options(**changes):
    return dataclasses.replace(PLAIN, **changes)


def cross_entropy(difference):
    """Of two classes, of which the true one's logit is so much greater."""
    return math.log(1 + math.exp(-difference))


def test_a_step_with_label_smoothing_by_hand():
    # Labels of 0.9 and 0.1 against probabilities of 1/2: 0.4 in place of 0.5, halved by the mean of two images.
    (first, second), done = train(linear(ROWS), TWO, training_phase(0.5, 0.0), config=options(label_smoothing=0.2))
    torch.testing.assert_close(first.tensors["weight"], torch.tensor([[1.1, 1.9], [0.9, 2.1]]))
    assert first.loss == pytest.approx(math.log(2), rel=1e-6)
    # The true class is 0.2 above the other now. What is minimised is smoothed, what is measured on test images is not.
    assert second.loss == pytest.approx(0.9 * cross_entropy(0.2) + 0.1 * cross_entropy(-0.2), rel=1e-6)
    assert done.metrics.loss == pytest.approx(cross_entropy(0.2), rel=1e-6)


# At temperature 2 this teacher gives class 0 four fifths for the first image and three fifths for the second.
TEACHER_ROWS = [[2 * math.log(4), 2 * math.log(1.5)], [0.0, 0.0]]


def test_a_step_with_distillation_by_hand():
    # A half of the plain gradient, and of T^2 KL, whose gradient by a logit is T times the difference of probabilities:
    # (1/2 (1/2 - 1) + 1/2 2 (1/2 - 4/5)) / 2 = -0.275 for the first image, (1/4 + 1/2 - 3/5) / 2 = 0.075 for the other.
    teacher = nn.Sequential(nn.Dropout(0.9), linear(TEACHER_ROWS), nn.BatchNorm1d(2, affine=False, eps=0.0))
    before = copy.deepcopy(teacher.state_dict())
    config = options(distill=0.5, distill_temperature=2.0)
    (epoch,), done = train(linear(ROWS), TWO, training_phase(0.5), config=config, teacher=teacher.train())
    torch.testing.assert_close(epoch.tensors["weight"], torch.tensor([[1.1375, 1.9625], [0.8625, 2.0375]]))
    divergences = 0.8 * math.log(1.6) + 0.2 * math.log(0.4), 0.6 * math.log(1.2) + 0.4 * math.log(0.8)
    assert epoch.loss == pytest.approx((math.log(2) + 4 * sum(divergences) / 2) / 2, rel=1e-6)
    # The test images' loss has nothing of it, and the teacher is only asked.
    assert done.metrics.loss == pytest.approx((cross_entropy(0.275) + cross_entropy(0.075)) / 2, rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_smoothing_and_distillation_together_against_plain_sums():
    generator = torch.Generator().manual_seed(1)
    output, teacher_logits = (3 * torch.randn(5, 3, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 2, 1])
    targets = 0.9 * functional.one_hot(labels, 3) + 0.1 / 3
    told = -(targets * output.softmax(1).log()).sum()
    ours, theirs = (output / 3).softmax(1), (teacher_logits / 3).softmax(1)
    imitated = (theirs * (theirs / ours).log()).sum()
    config = options(label_smoothing=0.1, distill=0.7, distill_temperature=3.0)
    torch.testing.assert_close(training_loss(output, labels, config, teacher_logits), 0.3 * told + 0.7 * 9 * imitated)
    # Without a teacher all that counts are the labels.
    torch.testing.assert_close(training_loss(output, labels, config), told)


@pytest.mark.parametrize(("ema", "decays"), [(0.9, (2 / 11, 3 / 12)), (0.2, (2 / 11, 0.2)), (0.1, (0.1, 0.1))])
def test_two_steps_of_the_average_by_hand(ema, decays):
    # The first step adds 1/8 to the true class's weights and takes it from the other's, which brings the true class 1/4
    # above the other; the second adds and takes a quarter of the other class's probability, 1 / (1 + exp(1/4)).
    second = 0.125 + 0.25 / (1 + math.exp(0.25))
    average = (1 - decays[0]) * 0.125
    model = linear(ROWS)
    epochs, done = train(model, TWO, training_phase(0.5, 0.5), config=options(ema=ema))
    for epoch, weight, mean in (
        (epochs[0], 0.125, average),
        (epochs[1], second, decays[1] * average + (1 - decays[1]) * second),
    ):
        moved = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        torch.testing.assert_close(epoch.optimizer_state["weights/weight"], torch.tensor(ROWS) + weight * moved)
        torch.testing.assert_close(epoch.tensors["weight"], torch.tensor(ROWS) + mean * moved)
    # What is measured, and what is left, is the average.
    assert done.metrics.loss == pytest.approx(cross_entropy(2 * mean), rel=1e-6)
    assert torch.equal(model.weight, epochs[1].tensors["weight"])


def test_without_an_average_nothing_more_is_carried():
    (epoch,), _ = train(linear(ROWS), TWO, training_phase(0.5), config=options(momentum=0.9))
    assert epoch.optimizer_state.keys() == {"momentum/weight"}


def test_the_average_of_a_network_with_batchnorm_against_plain_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    data = FakeData(torch.randn(12, 2).tolist(), [0, 1, 1] * 4)
    config = options(ema=0.5, momentum=0.9, weight_decay=0.01, batch_size=4)
    expected, steps = copy.deepcopy(model), 0
    average = copy.deepcopy(expected.state_dict())
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for number in range(3):
        for indices in epoch_batches(12, batch_size=4, seed=3, epoch=number):
            optimizer.zero_grad()
            functional.cross_entropy(expected(data.images[indices]), data.labels[indices]).backward()
            optimizer.step()
            steps += 1
            decay = min(0.5, (1 + steps) / (10 + steps))
            for name, tensor in expected.state_dict().items():
                mean = decay * average[name] + (1 - decay) * tensor
                average[name] = tensor.clone() if name.endswith("num_batches_tracked") else mean
    assert (steps, decay) == (9, 0.5)  # at the end it is the one asked for: 9 / 18 is reached at step 8
    epochs, _ = train(model, data, training_phase(0.1, 0.1, 0.1), config=config)
    assert epochs[-1].tensors.keys() == average.keys()
    for name, tensor in average.items():
        torch.testing.assert_close(epochs[-1].tensors[name], tensor)
        torch.testing.assert_close(epochs[-1].optimizer_state[f"weights/{name}"], expected.state_dict()[name])
    assert epochs[-1].tensors["1.num_batches_tracked"] == steps
    assert not torch.allclose(average["1.running_var"], expected.state_dict()["1.running_var"], rtol=1e-3)


def test_the_average_takes_the_memory_format_of_the_weights():
    model = nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last)
    average = MovingAverage(model, 0.5)
    assert average.tensors["weight"].is_contiguous(memory_format=torch.channels_last)
    assert average.tensors["weight"].data_ptr() != model.weight.data_ptr()


def test_the_averages_of_buffers_are_told_from_those_of_weights():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = MovingAverage(model, 0.5)
    names = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert [id(tensor) for tensor in average.buffers()] == [id(average.tensors[name]) for name in names]
