"""BatchNorm statistics measured anew: what is averaged, by hand, and that nothing else changes."""

import copy

import pytest
import torch
from helpers import randomise_batchnorm
from plain_losses import mean_loss
from torch import nn

from laasp_ray.config import SearchConfig
from laasp_ray.distributed import executor as on_ray
from laasp_ray.errors import SearchError
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.search import batchnorm
from laasp_ray.search import executor as in_process
from laasp_ray.search.batchnorm import norms_of, reestimate
from laasp_ray.search.evaluate import CalibrationSet, LossTask, ready
from laasp_ray.search.executor import InProcessExecutor


def subset_of(values, batch_size=2):
    """A picture of one channel for each row of values."""
    images = torch.tensor(values).reshape(len(values), 1, 1, -1)
    return CalibrationSet(images, torch.zeros(len(values), dtype=torch.int64), batch_size)


def test_the_mean_over_batches_by_their_images_by_hand(monkeypatch):
    monkeypatch.setattr(batchnorm, "BATCH", 2)
    # Two batches: 0, 2, 4, 6 with mean 3 and variance (9 + 1 + 1 + 9) / 3; 10, 14 with mean 12 and variance 8 / 1.
    found = reestimate(nn.Sequential(nn.BatchNorm2d(1)), subset_of([[0.0, 2.0], [4.0, 6.0], [10.0, 14.0]]))
    assert found.keys() == {"0.running_mean", "0.running_var"}
    assert float(found["0.running_mean"]) == pytest.approx((2 * 3 + 1 * 12) / 3, abs=1e-6)
    assert float(found["0.running_var"]) == pytest.approx((2 * 20 / 3 + 1 * 8) / 3, abs=1e-6)


def test_a_norm_that_is_run_twice_averages_over_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x):
            return self.norm(x) + self.norm(3 * x)

    # Mean 3 and variance 20 / 3 at the first call, mean 9 and nine times the variance at the second.
    found = reestimate(Twice(), subset_of([[0.0, 2.0], [4.0, 6.0]]))
    assert float(found["norm.running_mean"]) == pytest.approx(6, abs=1e-6)
    assert float(found["norm.running_var"]) == pytest.approx(5 * 20 / 3, rel=1e-6)


def test_a_norm_of_two_names_has_its_statistics_under_both():
    model = nn.Sequential(nn.BatchNorm2d(1))
    model.again = model[0]
    found = reestimate(model, subset_of([[0.0, 2.0], [4.0, 6.0]]))
    assert torch.equal(found["0.running_var"], found["again.running_var"])
    model.load_state_dict(found, strict=False)
    assert torch.equal(model[0].running_mean, found["0.running_mean"])


def test_norms_without_statistics_are_left_out():
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.GroupNorm(1, 1), nn.BatchNorm2d(1))
    assert list(norms_of(model)) == ["2"]
    assert reestimate(model, subset_of([[0.0, 1.0]])).keys() == {"2.running_mean", "2.running_var"}


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)]
    return randomise_batchnorm(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))).eval()


def pictures(count=96, batch_size=7):
    generator = torch.Generator().manual_seed(1)
    return CalibrationSet(torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 3, batch_size)


def test_equal_batches_give_what_torch_gives_without_momentum(network, monkeypatch):
    monkeypatch.setattr(batchnorm, "BATCH", 32)
    calibration = pictures()
    reference = copy.deepcopy(network)
    for module in (reference[1], reference[5]):
        module.reset_running_stats()
        module.train().momentum = None
    with torch.no_grad():
        for start in (0, 32, 64):
            reference(calibration.images[start : start + 32].contiguous(memory_format=torch.channels_last))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = reestimate(network, calibration)
    assert found.keys() == {"1.running_mean", "1.running_var", "5.running_mean", "5.running_var"}
    assert all(torch.equal(tensor, reference.state_dict()[name]) for name, tensor in found.items())
    # The second layer's statistics are those behind the first's own batches, not behind its running ones.
    assert not torch.allclose(found["5.running_mean"], before["5.running_mean"], atol=1e-2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module.training or module._forward_pre_hooks for module in network.modules())
    assert network[1].momentum == 0.1


def test_it_does_not_depend_on_the_batches_or_memory_of_the_search(network):
    state = capture(network, Plan.empty())
    found = []
    for batch_size, memory_mb in ((7, 0), (96, 1)):
        search = SearchConfig(batch_size=batch_size, memory_mb=memory_mb, reestimate_batchnorm=True)
        executor = InProcessExecutor(network, pictures(batch_size=batch_size), torch.device("cpu"), search, 0)
        found.append(executor.for_scoring(state).tensors)
    assert all(torch.equal(found[0][name], found[1][name]) for name in state.tensors)


def test_a_network_is_scored_as_it_is_unless_it_is_asked_for(network):
    state = capture(network, Plan.empty())
    executor = InProcessExecutor(network, pictures(), torch.device("cpu"), SearchConfig(), 0)
    assert executor.for_scoring(state) is state


def test_what_is_scored_is_the_network_with_its_statistics_in_place(network):
    calibration, state = pictures(), capture(network, Plan.empty())
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    search = SearchConfig(reestimate_batchnorm=True)
    executor = InProcessExecutor(network, calibration, torch.device("cpu"), search, 0)
    scored = executor.for_scoring(state)
    expected = before | reestimate(ready(copy.deepcopy(network), torch.device("cpu")), calibration)
    assert scored.tensors.keys() == before.keys() and scored.plan is state.plan
    assert all(torch.equal(scored.tensors[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in before.items())
    (result,) = executor.measure(
        scored, [LossTask("as it is", Plan.empty(), {})], lambda position, result: None, lambda share: None
    )
    network.load_state_dict(expected)
    assert result.loss == pytest.approx(mean_loss(network, calibration), abs=1e-5)


def test_the_task_of_a_cluster_measures_the_same_to_the_last_bit(network, monkeypatch):
    calibration = pictures()

    class Process:
        def network(self, *inputs):
            assert inputs == ("unpruned", "iteration", "calibration")
            return network, calibration

    monkeypatch.setattr(on_ray, "PROCESS", Process())
    arrays, serial = on_ray.statistics_task(["unpruned", "iteration", "calibration"]), reestimate(network, calibration)
    assert arrays.keys() == serial.keys()
    assert all(torch.equal(torch.from_numpy(arrays[name]), tensor) for name, tensor in serial.items())


def test_statistics_that_stay_are_those_of_the_first_images(network, monkeypatch):
    calibration, state = pictures(), capture(network, Plan.empty())
    executor = InProcessExecutor(network, calibration, torch.device("cpu"), SearchConfig(), 0)
    alone = ready(copy.deepcopy(network), torch.device("cpu"))
    first = next(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    whole = executor.statistics(state, [first])
    assert all(torch.equal(tensor, reestimate(alone, calibration, [first])[name]) for name, tensor in whole.items())
    monkeypatch.setattr(in_process, "ENOUGH", 5)
    some = executor.statistics(state, [first])
    few = subset_of([[float(n)] for n in (1, 2, 6)])
    assert reestimate(nn.Sequential(nn.BatchNorm2d(1)), few, images=2)["0.running_mean"].tolist() == [1.5]
    assert all(torch.equal(tensor, reestimate(alone, calibration, [first], 5)[name]) for name, tensor in some.items())
    assert any(not torch.equal(tensor, whole[name]) for name, tensor in some.items())


class Branches(nn.Module):
    """Two branches side by side, the first of two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.of_b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.other, self.of_other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.last, self.of_last = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)

    def read(self, x):
        return self.b(x)

    def forward(self, x):
        x = self.of_b(self.read(self.a(x)).relu()) + self.of_other(self.other(x))
        return self.of_last(self.last(nn.functional.max_pool2d(x, 2).clamp(0, 6))).mean((2, 3))


class Functional(Branches):
    def read(self, x):
        return nn.functional.conv2d(x, self.b.weight, self.b.bias)


class Switched(Branches):
    """Values pass a comparison only."""

    def read(self, x):
        return torch.where(super().read(x) > 0, 1.0, 0.0)


class Chosen(Branches):
    """Which way is taken depends on values, and a BatchNorm is called by the name of its argument."""

    def read(self, x):
        found = super().read(x)
        return found if found.mean() > 0 else self.of_last(input=found[:, :2]).repeat(1, 2, 1, 1)[:, :3]


class Careful(Branches):
    def read(self, x):
        found = super().read(x)
        assert found.abs().max() < 2
        return found


@pytest.mark.parametrize(
    ("make", "layers", "expected"),
    [
        (Branches, ["b"], {"of_b", "of_last"}),  # `of_other` runs later, and has nothing to do with it
        (Branches, ["last"], {"of_last"}),
        (Branches, ["a", "other"], {"of_b", "of_other", "of_last"}),
        (Switched, ["b"], {"of_b", "of_last"}),
        (Chosen, ["b"], {"of_b", "of_last"}),
        (Functional, ["b"], {"of_b", "of_other", "of_last"}),  # where it goes is not seen
        (Careful, ["b"], {"of_b", "of_other", "of_last"}),
    ],
)
def test_statistics_that_stay_are_those_of_norms_that_the_layers_go_into(make, layers, expected):
    found = reestimate(make().eval(), pictures(8), layers)
    assert {name.partition(".")[0] for name in found} == expected
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def test_a_batch_that_does_not_fit_is_named():
    class Large(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SearchError, match=r"batches of 2 images, .* does not fit .*search\.reestimate_batchnorm"):
        reestimate(nn.Sequential(nn.BatchNorm2d(1), Large()), subset_of([[0.0, 1.0], [2.0, 3.0]]))
