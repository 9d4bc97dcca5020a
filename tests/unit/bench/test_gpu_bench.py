"""bench/gpu.py: a stage that fails, hangs or dies takes no other with it, and nothing that was measured is lost."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import gpu
import gpu_packages
import pytest
import torch
from gpu_results import REHEARSAL, Results, Rows, StageResult
from gpu_training import Clock
from processes import Descendants

ROOT = Path(__file__).parents[3]


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Stages of a module of the test: (name, function, its body's lines, limit)."""

    def made(*bodies, limit=20.0):
        lines = ["import os, subprocess, sys, time"]
        for name, body in bodies:
            lines += [f"def {name}(options, rows):", textwrap.indent(textwrap.dedent(body), "    ")]
        (tmp_path / "own_stages.py").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(str(tmp_path))
        sys.modules.pop("own_stages", None)
        found = tuple(gpu.Stage(name, "own_stages", name, limit, limit) for name, _ in bodies)
        monkeypatch.setattr(gpu, "STAGES", found)
        monkeypatch.setattr(gpu, "PRELOADED", ())
        return gpu.parse(["--device", "cpu", "--out", str(tmp_path / "out")])

    return made


def run(options, **limits):
    options.out.mkdir(exist_ok=True)
    for name, value in limits.items():
        setattr(options, name, value)
    status = gpu.run_all(options)
    return status, json.loads((options.out / "results.json").read_text())


def outcomes(results):
    return {stage["name"]: stage["outcome"] for stage in results["stages"]}


def test_stages_that_fail_die_or_hang_take_no_other_with_them(stages, monkeypatch):
    options = stages(
        ("machine", "rows.add('here', {'n': 1}, True)"),
        ("raises", "rows.add('before', {'n': 2}, True)\nraise ValueError('broken here')"),
        ("dies", "rows.add('before', {'n': 3}, True)\nos.kill(os.getpid(), 9)"),
        ("hangs", "rows.add('before', {'n': 4}, True)\ntime.sleep(600)"),
        ("last", "rows.add('after all', {'n': 5.0}, True)"),
        limit=6.0,
    )
    monkeypatch.setattr(gpu, "LEAST_S", 1.0)
    began = time.monotonic()
    status, results = run(options)
    assert status == 1
    assert time.monotonic() - began < 60
    assert outcomes(results) == {
        "machine": "done",
        "raises": "failed",
        "dies": "failed",
        "hangs": "late",
        "last": "done",
    }
    assert [row["figures"]["n"] for row in results["rows"]] == [1, 2, 3, 4, 5.0]
    reasons = {stage["name"]: stage["reason"] for stage in results["stages"]}
    assert "ValueError: broken here" in reasons["raises"]
    assert reasons["dies"].startswith("exit status -9")


def test_an_error_in_a_stage_is_a_row_and_the_next_is_measured(stages):
    options = stages(
        ("machine", "with rows.trying('one'):\n    raise RuntimeError('CUDA error:\\n bad')\nrows.add('two', {}, True)")
    )
    status, results = run(options)
    assert status == 1
    first, second = results["rows"]
    assert (first["passed"], first["error"]) == (False, "RuntimeError: CUDA error: bad")
    assert (second["what"], second["passed"]) == ("two", True)
    page = (options.out / "results.md").read_text()
    assert "| one | ERROR | RuntimeError: CUDA error: bad |" in page
    assert "1 checks passed, 1 did not." in page


def test_what_a_stage_leaves_running_is_ended_with_it(stages, tmp_path):
    mark = tmp_path / "pid"
    options = stages(
        (
            "machine",
            f"""
            child = subprocess.Popen(['sleep', '600'], start_new_session=True)
            open({str(mark)!r}, 'w').write(str(child.pid))
            time.sleep(2)
            """,
        )
    )
    status, results = run(options)
    assert (status, outcomes(results)) == (0, {"machine": "done"})
    for _ in range(50):
        if not Path(f"/proc/{mark.read_text()}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{mark.read_text()}").exists()


@pytest.mark.exhaustive
def test_a_command_that_is_ended_ends_its_stage(stages, tmp_path):
    mark = tmp_path / "pid"
    stages(("machine", f"open({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"))
    code = f"""
        import sys
        sys.path[:0] = [{str(ROOT / "bench")!r}, {str(tmp_path)!r}]
        import gpu
        gpu.STAGES, gpu.PRELOADED = (gpu.Stage("machine", "own_stages", "machine", 100, 100),), ()
        sys.argv = ["gpu.py", "--device", "cpu", "--out", {str(tmp_path / "out")!r}]
        gpu.main()
    """
    command = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    for _ in range(600):
        if mark.exists() and mark.read_text():
            break
        time.sleep(0.1)
    command.terminate()
    assert command.wait(timeout=30) == 143
    assert not Path(f"/proc/{mark.read_text()}").exists()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["stages"] == []


def test_no_stage_begins_after_the_minutes_are_over(stages):
    options = stages(("machine", "time.sleep(3)"), ("late", "pass"))
    status, results = run(options, minutes=10.0 / 60)
    assert status == 0
    assert results["stages"][1] | {"seconds": 0} == {
        "name": "late",
        "outcome": "skipped",
        "seconds": 0,
        "limit": 0.0,
        "reason": "no time is left",
    }


def test_a_stage_without_its_packages_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(gpu_packages, "missing", lambda names: ["ray"] if "ray" in names else [])
    stage = gpu.Stage("run", "gpu_run", "whole_run", 10, 10, needs=("ray",))
    assert gpu.why_not(stage, "cuda", [], 100) == "missing packages: ray"
    assert gpu.why_not(gpu.STAGES[1], "cuda", ["fvcore"], 100).startswith("missing packages: fvcore; put their wheels")
    sparse = next(one for one in gpu.STAGES if one.gpu_only)
    assert gpu.why_not(sparse, "cpu", [], 100) == "needs an NVIDIA GPU"
    assert gpu.why_not(sparse, "cuda", [], 100) == ""


def test_all_stages_fit_into_nine_minutes_in_the_order_of_their_worth():
    assert [stage.name for stage in gpu.STAGES][:4] == ["machine", "losses", "choice", "run"]
    assert gpu.parse([]).minutes < 9
    for stage in gpu.STAGES:
        assert (ROOT / "bench" / f"{stage.module}.py").is_file()
        assert f"def {stage.function}(" in (ROOT / "bench" / f"{stage.module}.py").read_text()


def test_a_rehearsal_says_so_in_both_files(tmp_path):
    for device, said in (("cpu", True), ("cuda", False)):
        results = Results(tmp_path, device, {"date": "today"})
        results.stages.append(StageResult("machine", "done", 1.0, 2.0))
        Rows(tmp_path, "machine").add("one", {"s": 0.123456, "n": 12345.6}, True)
        results.write()
        page, content = (tmp_path / "results.md").read_text(), json.loads((tmp_path / "results.json").read_text())
        assert (REHEARSAL in page) is said
        assert (content["note"] == REHEARSAL) is said
        assert "| one | yes | s 0.1235; n 12,350 |" in page
    assert not gpu.parse(["--device", "cpu"]).out.is_relative_to(ROOT / "bench")
    assert gpu.parse(["--device", "cpu"]).out != gpu.parse([]).out


def test_a_line_that_a_killed_stage_did_not_finish_is_left_out(tmp_path):
    Rows(tmp_path, "a").add("whole", {})
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"stage": "a", "wh')
    assert [row["what"] for row in Results(tmp_path, "cpu").rows()] == ["whole"]


def test_packages_that_are_missing_are_named():
    assert gpu_packages.missing(["torch", "no_such_package_here"]) == ["no_such_package_here"]
    assert gpu_packages.missing(["no_such.inner"]) == ["no_such.inner"]
    assert "torch" in gpu_packages.versions()


def test_wheels_of_a_folder_are_installed_without_a_network(tmp_path):
    source = tmp_path / "wheels"
    source.mkdir()
    with pytest.raises(SystemExit, match="there is no wheel"):
        gpu_packages.install_wheels(source, tmp_path / "site")
    _write_wheel(source / "ownthing-1.0-py3-none-any.whl")
    site = gpu_packages.install_wheels(source, tmp_path / "site")
    code = "import ownthing, importlib.metadata as m; print(ownthing.VALUE, m.version('ownthing'))"
    environment = {**os.environ, "PYTHONPATH": site}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["7", "1.0"]


def _write_wheel(file):
    import zipfile

    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("ownthing.py", "VALUE = 7\n")
        folder = "ownthing-1.0.dist-info"
        wheel.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: ownthing\nVersion: 1.0\n")
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "")


def test_the_clock_counts_the_steps_between(monkeypatch):
    clock = Clock(2, 5, torch.device("cpu"))
    times = iter([10.0, 13.0])
    monkeypatch.setattr("gpu_training.time.perf_counter", lambda: next(times))
    for _ in range(5):
        clock.beat()
        clock.beat()
    assert clock.stop() == 3.0
    with pytest.raises(RuntimeError, match="0 steps were seen, 5 expected"):
        Clock(2, 5, torch.device("cpu")).stop()


def test_importing_what_stages_need_leaves_the_gpu_alone():
    """A stage is a copy of the process that imported it: CUDA could not be used in it if that process had."""
    code = """
        import sys
        sys.path[:0] = ["bench", "."]
        import torch
        def touched(*_): raise AssertionError("the GPU was touched")
        torch._C._cuda_getDeviceCount = torch.cuda.is_available = torch.cuda._lazy_init = touched
        import gpu
        gpu.preload()
        assert set(gpu.PRELOADED) <= set(sys.modules), set(gpu.PRELOADED) - set(sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_processes_are_known_by_their_start_too():
    child = subprocess.Popen(["sleep", "60"])
    family = Descendants(os.getpid())
    family.look()
    assert child.pid in family.alive()
    only = Descendants(child.pid)
    only.look()
    assert only.alive() == []
    child.kill()
    child.wait()
    assert child.pid not in family.alive()
