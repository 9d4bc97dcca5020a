"""Whole runs that export and time their network, and exports of runs that are over."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from fakes import Silent
from helpers import write_pictures
from whole_runs import events_of, on_pictures, read_events_of

from laasp_ray import load_pruned, prune
from laasp_ray.cli.export import export
from laasp_ray.config.compat import differing_keys
from laasp_ray.errors import ConfigError, ExportError
from laasp_ray.export.network import onnx_session
from laasp_ray.report.summary import format_summary, summarise
from laasp_ray.run import finishing
from laasp_ray.run.events import EVENTS, LatencyMeasured, NetworkExported, event_from
from laasp_ray.run.preflight import prepare

QUICK = {"export__latency": ["eager"], "export__latency_batches": [1, 2], "export__latency_seconds": 0.05}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), side=8, train=12, test=6)


def run(config):
    return prune(config, distributed=False, progress=Silent())


@pytest.fixture(scope="module")
def exported(tmp_path_factory, pictures):
    more = {"prune__compensate": "off", "prune__flops_reduction": 0.05, "export__format": "onnx", **QUICK}
    config = on_pictures(tmp_path_factory.mktemp("exported"), pictures, **more)
    return config, run(config)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, pictures):
    """A run that exports nothing."""
    config = on_pictures(tmp_path_factory.mktemp("plain"), pictures, prune__flops_reduction=0.001)
    return config, run(config)


def folder_of(config):
    return Path(config.storage) / config.name


def test_the_run_leaves_a_checked_file_and_says_so_in_its_journal(exported):
    config, result = exported
    names = [event.name for event in events_of(config)]
    assert names[-3:] == ["export", "latency", "finish"]
    (event,) = (event.export for event in read_events_of(config) if isinstance(event, NetworkExported))
    file = folder_of(config) / "pruned" / "model.onnx"
    assert (event.file, event.convolutions, event.bytes) == ("model.onnx", 21, file.stat().st_size)
    assert 0 < event.max_difference < 1e-3 * event.largest_output
    images = torch.randn(5, 3, 8, 8)
    logits = torch.from_numpy(onnx_session(file, 1).run(["logits"], {"images": images.numpy()})[0])
    with torch.inference_mode():
        assert torch.allclose(logits, result.model(images), atol=2 * event.max_difference + 1e-5)


def test_latencies_are_in_the_journal_and_in_the_metrics(exported):
    config, _ = exported
    (event,) = (event for event in read_events_of(config) if isinstance(event, LatencyMeasured))
    assert [(row.engine, row.batch_size, row.failed) for row in event.rows] == [("eager", 1, ""), ("eager", 2, "")]
    assert all(row.pruned.repeats == row.unpruned.repeats >= 3 for row in event.rows)
    metrics = json.loads((folder_of(config) / "pruned" / "metrics.json").read_text())
    assert [row["pruned"]["median_ms"] for row in metrics["latency"]] == [row.pruned.median_ms for row in event.rows]
    assert metrics["export"][0]["file"] == "model.onnx"


def test_the_summary_has_both(exported):
    text = format_summary(summarise(read_events_of(exported[0])))
    assert "Exported: pruned/model.onnx, opset" in text and "21 convolutions as planned" in text
    assert "latency, ms (10th to 90th percentile)" in text


def test_the_card_says_what_how_the_numbers_and_how_to_load(exported):
    config, result = exported
    card = (folder_of(config) / "pruned" / "model_card.md").read_text()
    summary = result.summary
    for text in (
        "# small\n\nPruned `cifar.resnet20`",
        "arguments: num_classes=3",
        "float32, (images, 3, 8, 8)",
        "- method: `laasp`\n- target: 5.00% of FLOPs gone\n- criteria: l1\n- compensation: off",
        f"| multiply-accumulates | {summary['macs_unpruned']:,} | {summary['macs']:,} |",
        f"| parameters | {summary['parameters_unpruned']:,} | {summary['parameters']:,} |",
        f" {summary['metrics']['top1']:.2%} |",
        "| eager | 2 |",
        'network = load_pruned("FOLDER")  # an nn.Module',
        "it needs torch, safetensors and nothing else",
        'onnxruntime.InferenceSession("model.onnx")',
    ):
        assert text in card, text
    assert config.storage not in card


def test_a_network_that_cannot_be_exported_ends_its_run_and_says_why(tmp_path, pictures, monkeypatch):
    def refuse(*_, **__):
        raise ExportError("torch.export cannot follow the network (it has an if)")

    monkeypatch.setattr(finishing, "export_network", refuse)
    config = on_pictures(tmp_path, pictures, prune__flops_reduction=0.001, export__format="torch")
    run(config)
    names = [event.name for event in events_of(config)]
    assert names[-2:] == ["export", "finish"]
    said = "Not exported (torch): torch.export cannot follow the network (it has an if)"
    assert said in format_summary(summarise(read_events_of(config)))
    assert said in (folder_of(config) / "pruned" / "model_card.md").read_text()
    assert not list((folder_of(config) / "pruned").glob("model.pt2"))
    assert load_pruned(folder_of(config)) is not None


def test_onnx_that_is_asked_for_without_its_packages_is_refused_before_the_run(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("laasp_ray.export.packages.missing", lambda: ("onnxruntime",))
    config = on_pictures(tmp_path, pictures, export__format="onnx")
    with pytest.raises(ConfigError, match=r"export\.format is 'onnx', which needs onnxruntime: pip install"):
        prepare(config)
    assert not list(tmp_path.iterdir())


def test_by_default_a_run_without_the_packages_ends_and_says_what_is_missing(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("laasp_ray.export.network.missing", lambda: ("onnxruntime",))
    config = on_pictures(tmp_path, pictures, prune__flops_reduction=0.001, export__format="auto")
    run(config)
    (event,) = (event.export for event in read_events_of(config) if isinstance(event, NetworkExported))
    assert event.text == "Not exported (onnx): ONNX needs onnxruntime: pip install 'laasp_ray[export]'"


def test_a_run_that_is_over_is_exported(plain, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(folder_of(plain[0]), folder)
    assert [event.name for event in events_of(plain[0])][-1] == "finish"
    assert export([str(folder), "--format", "torch"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Exported: pruned/model.pt2, 21 convolutions as planned")
    images = torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        logits = torch.export.load(folder / "pruned" / "model.pt2").module()(images)
        assert torch.allclose(logits, plain[1].model(images), atol=1e-6)
    config = dataclasses.replace(plain[0], storage=str(tmp_path), name="run")
    events = read_events_of(config)
    assert isinstance(events[-1], NetworkExported) and events[-1].export.file == "model.pt2"
    assert json.loads((folder / "pruned" / "metrics.json").read_text())["export"][0]["file"] == "model.pt2"
    assert 'torch.export.load("model.pt2")' in (folder / "pruned" / "model_card.md").read_text()
    # It is still the finished run, and exported again.
    assert summarise(events).finished and export([str(folder), "--format", "torch"]) == 0
    assert len(summarise(read_events_of(config)).exports) == 1


def test_a_folder_without_a_finished_run_is_refused(tmp_path, capsys):
    assert export([str(tmp_path)]) == 2
    assert f"{tmp_path} holds no finished run: give the folder of one" in capsys.readouterr().err


def test_a_builder_by_import_path_needs_trust(plain, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(folder_of(plain[0]), folder)
    path = folder / "journal" / "000001-start.json"
    content = json.loads(path.read_text())
    content["data"]["config"]["model"]["builder"] = "os:system"
    path.write_text(json.dumps(content))
    assert export([str(folder)]) == 2
    assert "names the network's builder by import path, 'os:system'" in capsys.readouterr().err


def test_the_settings_may_change_when_a_run_is_resumed(plain):
    ours = plain[0].to_dict()
    theirs = {**ours, "export": {**ours["export"], "format": "onnx", "latency": ["eager"]}}
    assert differing_keys(ours, theirs) == []


def test_events_of_an_export_need_no_more_than_its_format():
    assert {"export", "latency"} <= EVENTS.keys()
    event = event_from("export", {"export": {"format": "onnx", "reason": "why"}})
    assert isinstance(event, NetworkExported) and event.export.batches == ()
    rows = event_from("latency", {"rows": [{"engine": "compile", "batch_size": 1, "failed": "no compiler"}]})
    assert isinstance(rows, LatencyMeasured) and rows.rows[0].note == "not measured: no compiler"
