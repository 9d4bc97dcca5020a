"""Both networks in every engine, by turns; what an engine cannot do, and what a busy machine does, is in its row."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from laasp_ray.config import ExportConfig
from laasp_ray.cost.load import MachineLoad
from laasp_ray.errors import ConfigError
from laasp_ray.export import latency as engines
from laasp_ray.export.latency import EngineLatency, measure_engines

SHAPE, CPU = (3, 8, 8), torch.device("cpu")
QUIET, LOADED = MachineLoad(2, 1.0, 0.0), MachineLoad(2, 0.25, 2.0)


def network(width):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 4))


@pytest.fixture
def timed(monkeypatch):
    """Runs every pass once, and says these times of them."""
    said = {"load": QUIET, "ms": (10.0, 5.0), "spread": 0.1}

    def by_turns(passes, where, **how):
        assert (how["rounds"], how["warmup"]) == (30, 3) and how["most_s"] == 2.0
        for run in passes:
            run()
        pair = [
            engines.Latency(
                ms, (ms * (1 - said["spread"] / 2), ms * (1 + said["spread"] / 2)), *vars(where).values(), 30
            )
            for ms in said["ms"]
        ]
        return pair, said["load"]

    monkeypatch.setattr(engines, "measure_by_turns", by_turns)
    return said


def measured(*names, batches=(1, 4), unpruned=16, pruned=8, **more):
    config = ExportConfig(latency=names, latency_batches=batches, latency_seconds=2.0)
    return measure_engines(network(unpruned), network(pruned), SHAPE, config, CPU, **more)


def test_a_row_for_each_engine_and_batch(timed):
    rows = measured("eager", "onnxruntime")
    assert [(row.engine, row.batch_size) for row in rows] == [
        ("eager", 1),
        ("eager", 4),
        ("onnxruntime", 1),
        ("onnxruntime", 4),
    ]
    assert {(row.unpruned.median_ms, row.pruned.median_ms, row.note) for row in rows} == {(10.0, 5.0, "")}
    assert [row.pruned.batch_size for row in rows] == [1, 4, 1, 4]
    assert {(row.pruned.device, row.pruned.threads) for row in rows} == {("cpu", torch.get_num_threads())}


def test_a_real_measurement():
    config = ExportConfig(latency=("eager",), latency_batches=(2,), latency_seconds=0.2)
    (row,) = measure_engines(network(16), network(8), SHAPE, config, CPU)
    assert row.pruned.repeats == row.unpruned.repeats >= 3 and row.pruned.median_ms > 0
    assert row.load.cores >= 1 and row.load.own > 0 and row.pruned.cpu_ms > 0


def test_a_network_that_is_not_faster_says_why(timed):
    timed["ms"] = (10.0, 9.9)
    (row,) = measured("eager", batches=(1,), pruned=9)  # 9 channels, and 9 x 36 inputs of the head
    assert "2 of 2 layers" in row.slower and "--set prune.round_to=8" in row.slower
    assert row.note == f"not faster: {row.slower}"
    (same,) = measured("eager", batches=(1,), pruned=16)  # nothing was pruned
    assert same.note == ""


def test_figures_of_a_busy_machine_are_marked_and_explain_nothing(timed):
    timed["ms"], timed["load"] = (738.0, 738.0), LOADED
    (row,) = measured("eager", batches=(1,))
    assert row.busy[0] == "while it computed, this process got 0.25 of a core" and row.slower == ""
    assert row.note.startswith("the machine was too busy for these figures to mean anything: while it computed")
    timed["load"], timed["spread"] = QUIET, 0.6
    assert measured("eager", batches=(1,))[0].busy == ("times of one network lie 60% of their median apart",)


def test_what_cannot_be_compiled_is_told_and_the_others_go_on(timed, monkeypatch):
    def refuse(model, **_):
        raise RuntimeError("Failed to find C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", refuse)
    rows = measured("compile", "eager", batches=(1,))
    assert [row.note for row in rows] == ["not measured: RuntimeError: Failed to find C++ compiler", ""]
    assert rows[0].unpruned is None


def test_both_networks_are_compiled_for_each_batch(timed, monkeypatch):
    made = []

    def compiled(model, dynamic):
        made.append(model[0].out_channels)
        assert dynamic is False
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    assert [row.batch_size for row in measured("compile")] == [1, 4]
    assert made == [16, 8, 16, 8]


@pytest.mark.parametrize(
    ("seconds", "limit", "compiled", "figures", "said"),
    [
        (20.0, 80.0, 4, [True, True], ""),
        (20.0, 79.0, 2, [True, False], "took 20 s, and 2 more would exceed the 79 s of export.compile_seconds"),
        (20.0, 39.0, 1, [False, False], "took 20 s, and 1 more would exceed the 39 s of export.compile_seconds"),
        (500.0, 300.0, 1, [False, False], "took 500 s, and 1 more would exceed the 300 s of export.compile_seconds"),
    ],
)
def test_compiling_ends_at_its_limit(timed, monkeypatch, seconds, limit, compiled, figures, said):
    """Each network takes so long for each batch. What is under way is finished, what would be too long not begun."""
    clock, made = [0.0], []

    def compile(model, dynamic):
        def run(inputs):
            if (model, len(inputs)) not in made:
                made.append((model, len(inputs)))
                clock[0] += seconds
            return model(inputs)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(engines, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    config = ExportConfig(
        latency=("compile", "eager"), latency_batches=(1, 4), latency_seconds=2.0, compile_seconds=limit
    )
    rows = measure_engines(network(16), network(8), SHAPE, config, CPU)
    assert [row.pruned is not None for row in rows] == [*figures, True, True] and len(made) == compiled
    assert said in next((row.note for row in rows if row.pruned is None), "")


def test_nothing_is_compiled_for_figures_that_mean_nothing(timed, monkeypatch):
    timed["load"] = LOADED
    monkeypatch.setattr(torch, "compile", None)
    rows = measured("eager", "compile", batches=(1,), compile_when_busy=False)
    assert rows[1].note == (
        "not measured: the machine was too busy to compile for it (while it computed, this process got 0.25 of a core)"
    )


def test_without_onnxruntime_its_row_has_the_remedy(timed, monkeypatch):
    monkeypatch.setattr(engines, "missing", lambda: ("onnxruntime",))
    (row,) = measured("onnxruntime", batches=(1,))
    assert row.note == "not measured: it needs onnxruntime: pip install 'laasp_ray[export]'"


def test_settings_that_are_none():
    with pytest.raises(ConfigError, match=r"export\.latency is .*, must be different engines"):
        ExportConfig(latency=("eager", "eager"))
    with pytest.raises(ConfigError, match=r"export\.latency_batches is \(\), must be numbers of at least 1"):
        ExportConfig(latency_batches=())
    with pytest.raises(ConfigError, match=r"export\.latency_seconds is 0\.0, must be above 0"):
        ExportConfig(latency_seconds=0)
    assert EngineLatency(engine="eager", batch_size=1).note == ""
