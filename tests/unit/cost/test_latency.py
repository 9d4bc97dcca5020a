import time

import pytest
import torch
from torch import nn

from laasp_ray.cost.latency import Conditions, Latency, measure_by_turns, measure_pair


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


def by_turns(times, clock, **how):
    """Measures passes that take these seconds by a clock of the test's own, and compute half of that."""
    taken = []

    def run(name, seconds):
        taken.append(name)
        clock["wall"] += seconds
        clock["cpu"] += seconds / 2

    passes = [lambda name=name, seconds=seconds: run(name, seconds) for name, seconds in times.items()]
    found, _ = measure_by_turns(passes, Conditions(4, "cpu", 2), **how)
    return taken, found


@pytest.fixture
def clock(monkeypatch):
    times = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: times["wall"])
    monkeypatch.setattr(time, "process_time", lambda: times["cpu"])
    return times


def test_rounds_go_on_until_there_are_enough_and_end_before_they_take_too_long(clock):
    taken, found = by_turns({"a": 0.25, "b": 0.125}, clock, rounds=4, warmup=1)
    assert taken == ["a", "b"] * 5
    assert found == [
        Latency(250.0, (250.0, 250.0), 4, "cpu", 2, 4, 125.0),
        Latency(125.0, (125.0, 125.0), 4, "cpu", 2, 4, 62.5),
    ]
    # Rounds of 0.375 s: 2 s have passed after six; seven would end after 2.5 s.
    assert by_turns({"a": 0.25, "b": 0.125}, clock, rounds=4, warmup=0, least_s=2.0)[1][0].repeats == 6
    assert by_turns({"a": 0.25, "b": 0.125}, clock, rounds=9, warmup=0, most_s=2.5)[1][0].repeats == 6
    assert by_turns({"a": 0.25, "b": 0.125}, clock, rounds=9, warmup=0, most_s=0.1)[1][0].repeats == 3


def test_records_of_before_have_no_cpu_time():
    old = Latency(2.0, (1.0, 4.0), 1, "cpu", 2, 20)
    assert old.cpu_ms is None and old.relative_spread == 1.5
