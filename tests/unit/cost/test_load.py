"""Times that mean nothing are told by what the machine did meanwhile."""

import time
from types import SimpleNamespace

import psutil
import pytest

from laasp_ray.cost import load
from laasp_ray.cost.load import LoadMeter, MachineLoad, why_too_busy


@pytest.mark.parametrize(
    ("found", "threads", "spreads", "reasons"),
    [
        (MachineLoad(cores=2, own=1.9, others=0.1), 2, [0.1, 0.2], ()),
        (MachineLoad(cores=2, own=0.9, others=0.0), 2, [0.1, 0.5], ()),
        (MachineLoad(2, 0.41, 0.0), 2, [0.1], ("while it computed, this process got 0.41 of a core",)),
        (MachineLoad(2, 1.2, 0.8), 2, [0.1], ("other processes used 0.8 of 2 cores, beside 2 threads of its own",)),
        (MachineLoad(2, 1.0, 1.0), 1, [0.1], ()),  # each has a core of its own
        (MachineLoad(8, 7.0, 0.2), 16, [0.1], ()),  # more threads than cores are no fault of others
        (MachineLoad(2, 1.9, 0.1), 2, [0.1, 0.8], ("times of one network lie 80% of their median apart",)),
    ],
)
def test_what_makes_times_meaningless(found, threads, spreads, reasons):
    assert why_too_busy(found, threads, spreads, on_cpu=True) == reasons


def test_a_process_that_waits_for_its_gpu_is_not_starved():
    assert why_too_busy(MachineLoad(16, 0.3, 2.0), 8, [0.1], on_cpu=False) == ()


def test_the_meter_adds_up_cores(monkeypatch):
    clock = SimpleNamespace(wall=10.0, own=3.0, user=100.0, steal=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.wall)
    monkeypatch.setattr(time, "process_time", lambda: clock.own)
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(user=clock.user, system=5.0, steal=clock.steal))
    monkeypatch.setattr(load.os, "cpu_count", lambda: 4)
    meter = LoadMeter()
    meter.note(2.0, 3.0)
    meter.note(2.0, 1.0)
    clock.wall, clock.own, clock.user, clock.steal = 20.0, 8.0, 114.0, 1.0
    # 4 s on all cores in passes of 4 s; 15 s of all processes in 10 s, of which 5 s were its own.
    assert meter.read() == MachineLoad(cores=4, own=1.0, others=1.0)
