import time

import pytest
import torch
from torch import nn

from laasp_ray.cost.latency import measure_pair


class Log(list):
    """One list for a network and its copies."""

    def __deepcopy__(self, memo):
        return self


class Sleeper(nn.Module):
    """Sleeps, notes what it was given, and insists on eval mode."""

    def __init__(self, seconds, log=None):
        super().__init__()
        self.seconds, self.log = seconds, Log() if log is None else log
        self.dropout = nn.Dropout()

    def forward(self, x):
        assert not self.training
        self.log.append((self.seconds, tuple(x.shape)))
        time.sleep(self.seconds)
        return x


def test_number_and_circumstances():
    model, other = Sleeper(0.004), Sleeper(0.0)
    model.dropout.eval()
    latency, _ = measure_pair(model, other, (3, 2, 2), batch_size=5, device="cpu", repeats=7, warmup=2)
    assert [shape for _, shape in model.log] == [(5, 3, 2, 2)] * 9
    assert 4 <= latency.spread[0] <= latency.median_ms <= latency.spread[1]
    assert latency.median_ms < 100
    assert (latency.batch_size, latency.device, latency.repeats) == (5, "cpu", 7)
    assert latency.threads == torch.get_num_threads()
    assert model.training
    assert not model.dropout.training


def test_a_pair_is_measured_by_iterations():
    log = Log()
    slow, quick = measure_pair(Sleeper(0.006, log), Sleeper(0.001, log), (1,), device="cpu", repeats=4, warmup=1)
    assert [seconds for seconds, _ in log] == [0.006, 0.001] * 5
    assert slow.median_ms >= 6 > quick.spread[0]


def test_kernels_are_those_that_whoever_runs_the_network_gets(monkeypatch):
    class Asks(nn.Module):
        def forward(self, x):
            found.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled))
            return x

    found: list[tuple[bool, bool]] = []
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as training in this process leaves it
    measure_pair(Asks(), Asks(), (1,), device="cpu", repeats=2, warmup=0)
    assert found == [(False, True)] * 4 and torch.backends.cudnn.deterministic


def test_mode_comes_back_when_the_network_fails():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    with pytest.raises(RuntimeError):
        measure_pair(model, model, (4,), device="cpu")
    assert model.training
    assert model[1].training


def test_too_few_repeats():
    with pytest.raises(ValueError, match="repeats=1"):
        measure_pair(nn.Identity(), nn.Identity(), (1,), device="cpu", repeats=1)
