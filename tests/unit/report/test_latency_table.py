"""The table of latencies, line by line."""

from laasp_ray.cost.latency import Latency
from laasp_ray.export.latency import EngineLatency
from laasp_ray.report.latency import latency_lines


def timed(ms, batch, spread=0.0):
    return Latency(ms, (ms - spread, ms + spread), batch, "cpu", 2, 30)


def row(engine, batch, unpruned, pruned, **more):
    return EngineLatency(
        engine=engine, batch_size=batch, unpruned=timed(unpruned, batch, 1.0), pruned=timed(pruned, batch, 0.5), **more
    )


def test_figures_with_their_spread_and_what_has_to_be_said():
    busy = ("while it computed, this process got 0.25 of a core",)
    rows = [
        row("eager", 1, 10.0, 8.0),
        row("eager", 64, 100.0, 100.0, slower="2 of 3 layers are bound by memory"),
        row("onnxruntime", 1, 738.0, 738.0, busy=busy),
        row("onnxruntime", 64, 738.0, 738.0, busy=busy),
        EngineLatency(engine="compile", batch_size=1, failed="RuntimeError: no compiler"),
    ]
    lines = [" ".join(line.split()) for line in latency_lines(rows)]
    assert lines[0] == "latency, ms (10th to 90th percentile) batch unpruned pruned speed-up passes"
    assert lines[2:] == [
        "eager 1 10.00 (9.00 to 11.00) 8.00 (7.50 to 8.50) 1.25x 30",
        "eager 64 100.00 (99.00 to 101.00) 100.00 (99.50 to 100.50) 1.00x 30",
        "onnxruntime ! 1 738.00 (737.00 to 739.00) 738.00 (737.50 to 738.50) 1.00x 30",
        "onnxruntime ! 64 738.00 (737.00 to 739.00) 738.00 (737.50 to 738.50) 1.00x 30",
        "compile 1 - - - -",
        "Forward passes by turns on cpu, 2 threads",
        "- eager at batch 64: not faster: 2 of 3 layers are bound by memory",
        "! onnxruntime at batch 1, onnxruntime at batch 64: the machine was too busy for these figures to mean "
        "anything: while it computed, this process got 0.25 of a core",
        "- compile at batch 1: not measured: RuntimeError: no compiler",
    ]


def test_nothing_measured_has_no_place():
    rows = [EngineLatency(engine="compile", batch_size=1, failed="no compiler")]
    assert latency_lines(rows)[2:] == [
        f"{'compile':<37}      1         -       -         -       -",
        "- compile at batch 1: not measured: no compiler",
    ]


def test_quick_passes_have_more_digits():
    (line,) = latency_lines([row("eager", 1, 0.5, 0.25)])[2:3]
    assert " ".join(line.split()) == "eager 1 0.500 (-0.500 to 1.500) 0.250 (-0.250 to 0.750) 2.00x 30"


def test_a_busy_machine_leaves_the_cpu_time():
    latency = Latency(738.0, (700.0, 800.0), 1, "cpu", 2, 30, 10.25)
    found = EngineLatency(engine="eager", batch_size=1, unpruned=latency, pruned=latency, busy=("why",))
    assert found.note.endswith("to mean anything: why; its CPU time was 10.2 and 10.2 ms a pass")
