"""Whole runs in this process, without Ray; cut off at every single event."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from fakes import Silent
from helpers import small_run, write_digits, write_pictures
from safetensors.torch import load_file, save_file
from whole_runs import events_of, on_digits, on_pictures, power_cut, read_events_of

from laasp_ray import load_pruned, prune
from laasp_ray.api import _close
from laasp_ray.config import GroupSparsityConfig, ModelConfig, RunConfig
from laasp_ray.errors import ConfigError, DataError, StoreError, TrainingError
from laasp_ray.methods import laasp
from laasp_ray.models import build
from laasp_ray.report.progress import LineProgress
from laasp_ray.report.summary import format_summary, summarise
from laasp_ray.run.events import RunResumed


def run(config: RunConfig, model=None, progress=None):
    return prune(config, model, distributed=False, progress=progress or Silent())


def decisions(config: RunConfig):
    return [event.data["decision"] for event in events_of(config) if event.name == "iteration"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), side=16, train=60, test=12)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits):
    config, lines = on_digits(tmp_path_factory.mktemp("undisturbed"), digits), io.StringIO()
    result = run(config, progress=LineProgress(config.prune.targets, lines, lambda: 0.0))
    assert "going on" not in lines.getvalue()
    # Every training phase says it to the journal; who watches is told once.
    loaders = [event.data["loader"] for event in events_of(config) if event.name == "training_phase"]
    assert len(loaders) > 2 and set(loaders) == {"dali-cpu"}
    noted = [line for line in lines.getvalue().splitlines() if "are read by" in line]
    assert noted == ["note: the trainers' data are read by dali-cpu"]
    return config, result


def test_a_run_meets_its_target_and_writes_down_what_it_did(undisturbed):
    config, result = undisturbed
    names = [event.name for event in events_of(config)]
    # Two epochs of training and the training phase's end come first; the run's end comes last.
    assert names[:4] == ["start", "epoch", "epoch", "training_phase"]
    assert names[-3:] == ["epoch", "training_phase", "finish"]
    assert names.count("iteration") >= 3
    reductions = [decision["flops_reduction"] for decision in decisions(config)]
    assert reductions == sorted(reductions)
    assert reductions[-2] < 0.12 <= reductions[-1] == pytest.approx(result.summary["flops_reduction"])
    folder = Path(config.storage) / config.name
    for name in (
        "config.json",
        "pruned/model.safetensors",
        "pruned/arch.json",
        "pruned/plan.json",
        "pruned/metrics.json",
        "candidates/000001.parquet",
    ):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").iterdir())
    epochs = names.count("epoch")
    assert {path.stem for path in (folder / "checkpoints").iterdir()} == {
        "unpruned",
        f"{epochs - 2:06d}",
        f"{epochs - 1:06d}",
    }


def test_the_last_weights_of_each_training_phase_are_kept_if_asked(tmp_path):
    pictures = write_pictures(tmp_path / "images", side=8, train=12, test=6)
    config = on_pictures(tmp_path, pictures, train__keep_checkpoints=True, prune__fine_tune_epochs=2)
    run(config)
    epochs = [event for event in events_of(config) if event.name == "epoch"]
    last = {event.data["training_phase"]: event.data["checkpoint"] for event in epochs}
    assert len(last) >= 3 and len(epochs) > len(last) + 2
    names = {path.stem for path in (tmp_path / config.name / "checkpoints").iterdir()}
    assert {name for name in names if not name.startswith("initial")} == {"unpruned", *last.values()}


def test_the_saved_network_is_the_one_that_was_trained(undisturbed):
    config, result = undisturbed
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(load_pruned(Path(config.storage) / config.name)(images), result.model(images))


def test_a_finished_run_is_left_alone(undisturbed, caplog):
    config, result = undisturbed
    before = len(events_of(config))
    again = run(config)
    assert "is finished; nothing to do" in caplog.text
    assert len(events_of(config)) == before
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_a_finished_run_leaves_the_network_that_is_given_alone(undisturbed):
    config, result = undisturbed
    model = build(config.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = run(config, model).model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in result.model.state_dict().items())


def my_network(num_classes):
    return build(ModelConfig(builder="cifar.resnet20", arguments={"num_classes": num_classes}))


def test_a_finished_run_of_a_builder_by_import_path_is_loaded(undisturbed, digits, tmp_path):
    config, result = undisturbed
    shutil.copytree(config.storage, tmp_path / "runs")
    mine = on_digits(tmp_path / "runs", digits, model__builder=f"{__name__}:my_network")
    start = tmp_path / "runs" / "small" / "journal" / "000001-start.json"
    event = json.loads(start.read_text())
    event["data"]["config"] = mine.to_dict()
    start.write_text(json.dumps(event))
    arch = tmp_path / "runs" / "small" / "pruned" / "arch.json"
    arch.write_text(json.dumps(json.loads(arch.read_text()) | {"builder": mine.model.builder}))
    again = run(mine).model
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in result.model.state_dict().items())


def test_a_iteration_is_written_down_with_what_is_left_of_each_layer(undisturbed):
    config, _ = undisturbed
    iterations = [event.data for event in events_of(config) if event.name == "iteration"]
    plan = json.loads((Path(config.storage) / config.name / "pruned" / "plan.json").read_text())
    assert iterations[-1]["kept_filters"] == {layer: len(kept) for layer, kept in plan["layers"].items()}
    assert all("plan" not in iteration for iteration in iterations)


def test_another_config_under_the_same_name_is_refused_with_the_keys(undisturbed, digits):
    config, _ = undisturbed
    other = on_digits(Path(config.storage), digits, prune__step=0.04, seed=1)
    with pytest.raises(ConfigError, match=r"prune\.step: 0\.03 there, 0\.04 here; seed: 0 there, 1 here"):
        run(other)


def test_a_run_cut_off_at_every_event_ends_as_if_it_never_was(undisturbed, digits, tmp_path, monkeypatch):
    reference, result = undisturbed
    config = on_digits(tmp_path, digits)
    for position in range(len(events_of(reference))):
        with power_cut(monkeypatch, position):
            run(config)
    before, progress = events_of(config), Silent()
    again = run(config, progress=progress)
    (state,) = [state for event, state in progress.seen if isinstance(event, RunResumed)]
    assert state.phase == "done"
    assert state.iteration == sum(event.name == "iteration" for event in before)
    assert state.epochs_trained == sum(event.name == "epoch" for event in before)
    # The seconds are those of the work that counts, whichever attempt it was done in.
    work = [event.data for event in before if event.name in ("epoch", "iteration", "training_phase")]
    took = [data.get("evaluation_seconds", data["seconds"]) for data in work]
    took = [seconds["total"] if isinstance(seconds, dict) else seconds for seconds in took]
    took += [data.get("test_seconds", 0.0) for data in work]
    assert events_of(config)[-1].data["seconds"] == pytest.approx(sum(took))
    assert decisions(config) == decisions(reference)
    assert [event.name for event in events_of(config)] == [event.name for event in events_of(reference)]
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_given_weights_are_measured_first_and_the_first_training_left_out(undisturbed, digits, tmp_path):
    reference, _ = undisturbed
    weights = tmp_path / "weights.safetensors"
    unpruned = load_file(Path(reference.storage) / reference.name / "checkpoints" / "unpruned.safetensors")
    save_file({name.removeprefix("model/"): tensor for name, tensor in unpruned.items()}, weights)
    config = on_digits(tmp_path / "runs", digits, train__pretrained=str(weights), prune__iterations=1)
    run(config)
    names = [event.name for event in events_of(config)]
    assert names[:4] == ["start", "baseline", "calibration", "iteration"]
    before = next(event for event in events_of(reference) if event.name == "training_phase").data["metrics"]
    assert events_of(config)[1].data["metrics"]["top1"] == pytest.approx(before["top1"])
    # The same weights and the same images: the same first decision.
    assert decisions(config)[0]["layer"] == decisions(reference)[0]["layer"]
    assert decisions(config)[0]["filters"] == decisions(reference)[0]["filters"]


def test_a_run_with_too_many_unreadable_images_goes_on_when_more_are_allowed(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", side=16, train=24, test=6)
    (pictures / "train" / "a" / "000.png").write_bytes(b"")
    changes = {
        "data__path": str(pictures),
        "data__format": "folder",
        "model__arguments": {"num_classes": 3},
        "train__prune_epoch": 0,
        "train__epochs": 1,
        "train__batch_size": 12,
        "prune__flops_reduction": 0.02,
    }
    for _ in range(2):
        with pytest.raises(DataError, match=r"data\.max_unreadable"):
            run(small_run(tmp_path, **changes, data__max_unreadable=0))
    config = small_run(tmp_path, **changes, data__max_unreadable=1)
    run(config)
    left_out = [event.data for event in events_of(config) if event.name == "excluded"]
    place = {"split": "train", "index": 0, "label": 0}
    assert left_out == [{"image": "train/a/000.png", "reason": "cannot be read or decoded", **place}]


def test_a_part_that_cannot_be_closed_keeps_none_of_the_others_open(caplog):
    closed = []

    class Part:
        def __init__(self, name):
            self.name = name

        def close(self):
            closed.append(self.name)
            if self.name != "b":
                raise OSError(f"{self.name} hangs")

    with pytest.raises(KeyboardInterrupt):
        try:
            raise KeyboardInterrupt
        finally:
            _close([Part("a"), Part("b"), Part("c")])
    assert closed == ["a", "b", "c"]
    assert "closing Part failed" in caplog.text and "a hangs" in caplog.text and "c hangs" in caplog.text


def test_training_that_diverges_names_the_epoch_and_the_last_good_checkpoint(digits, tmp_path):
    config = on_digits(tmp_path, digits, train__learning_rate=1e20)
    with pytest.raises(TrainingError, match=r"epoch [01] .*not finite.*last good checkpoint: .*checkpoints/"):
        run(config)


def test_a_target_beyond_the_limits_names_what_can_be_reached(tmp_path):
    with pytest.raises(ConfigError, match=r"prune\.flops_reduction is 0\.99, .* at most 0\.\d+ can be reached"):
        run(small_run(tmp_path, prune__flops_reduction=0.99))


def test_a_network_of_another_number_of_classes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="12 outputs, the training data 10 classes"):
        run(small_run(tmp_path, model__arguments={"num_classes": 12}))


class ByL2(laasp.Laasp):
    def iterate(self, context):
        config = dataclasses.replace(context.config, criteria=("l2",))
        return super().iterate(dataclasses.replace(context, config=config))


def test_a_method_that_is_given_decides(digits, tmp_path, monkeypatch):
    config = on_digits(tmp_path, digits, train__prune_epoch=0, train__epochs=1, prune__flops_reduction=0.02)
    prune(config, distributed=False, progress=Silent(), method=ByL2())
    assert {decision["criterion"] for decision in decisions(config)} == {"l2"}
    assert "l2" not in config.prune.criteria
    again = dataclasses.replace(config, name="again")
    with power_cut(monkeypatch, 3):
        prune(again, distributed=False, progress=Silent(), method=ByL2())
    for other, named in ((None, "it is given none"), (laasp.Laasp(), r"laasp_ray\.methods\.laasp\.Laasp")):
        with pytest.raises(ConfigError, match=rf"was started with .*ByL2, now .*{named}.*give the same method"):
            prune(again, distributed=False, progress=Silent(), method=other)
    prune(again, distributed=False, progress=Silent(), method=ByL2())
    assert decisions(again) == decisions(config)
    sparse = dataclasses.replace(config, name="sparse", prune=GroupSparsityConfig())
    with pytest.raises(ConfigError, match="ByL2 takes a section prune of class LaaspConfig, this run's is a GroupSp"):
        prune(sparse, distributed=False, progress=Silent(), method=ByL2())


def test_an_unknown_criterion_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match="l3"):
        run(small_run(tmp_path, prune__criteria=["l3"]))
    assert not (tmp_path / "small" / "journal").exists()


def test_a_folder_that_is_no_runs_is_named(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text("{")
    with pytest.raises(StoreError, match=r"config\.json in .* is damaged: it is not JSON"):
        run(small_run(tmp_path))


def test_the_subset_is_checked_to_be_the_one_the_run_began_with(digits, tmp_path, monkeypatch):
    config = on_digits(tmp_path, digits)
    with power_cut(monkeypatch, 6):  # the calibration set is drawn and journaled before the first iteration
        run(config)
    path = next((tmp_path / "small" / "journal").glob("*-calibration.json"))
    event = json.loads(path.read_text())
    event["data"]["digest"] = "0" * 64
    path.write_text(json.dumps(event))
    with pytest.raises(Exception, match="calibration set drawn now has digest"):
        run(config)


PLS = {
    "prune__method": "pls",
    "prune__iterations": 2,
    "prune__percent": 5.0,
    "prune__flops_reduction": 0.9,
    "prune__fine_tune_every": 0.0,
    "train__epochs": 2,
    "train__prune_epoch": 1,
}


@pytest.fixture(scope="module")
def by_pls(tmp_path_factory, digits):
    config = on_digits(tmp_path_factory.mktemp("pls"), digits, **PLS)
    return config, run(config)


def test_a_run_by_pls_prunes_many_layers_a_iteration_and_ends_after_its_iterations(by_pls):
    config, result = by_pls
    names = [event.name for event in events_of(config)]
    training_phases = [event.data["phase"] for event in events_of(config) if event.name == "training_phase"]
    assert (
        training_phases == ["train", "fine-tune", "fine-tune", "final"]
        and names.count("iteration") == 2
        and names[-1] == "finish"
    )
    gone = []
    for decision in decisions(config):
        layers = [decision["layer"], *(prune["layer"] for prune in decision["further"])]
        assert len(layers) > 1 and all(layer.endswith("conv1") and "." in layer for layer in layers)
        gone.append(sum(len(prune["filters"]) for prune in (decision, *decision["further"])))
    assert gone == [17, 16]  # 5% of 3 x (16 + 32 + 64) = 336, and of the 319 that are left
    blocks = [block for stage in (1, 2, 3) for block in result.model.get_submodule(f"layer{stage}")]
    assert sum(block.conv1.out_channels for block in blocks) == 336 - sum(gone)
    assert decisions(config)[-1]["flops_reduction"] == pytest.approx(result.summary["flops_reduction"])
    assert not (Path(config.storage) / config.name / "candidates").exists()
    summary = format_summary(summarise(read_events_of(config)))
    assert "Iterations: 2, " in summary and "candidates" not in summary
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(load_pruned(Path(config.storage) / config.name)(images), result.model(images))


def test_a_run_by_pls_cut_off_at_its_iterations_ends_as_if_it_never_was(by_pls, digits, tmp_path, monkeypatch):
    reference, result = by_pls
    config = on_digits(tmp_path, digits, **PLS)
    names = [event.name for event in events_of(reference)]
    second_iteration = len(names) - 1 - names[::-1].index("iteration")
    for position in (second_iteration, second_iteration + 1, len(names) - 1):
        with power_cut(monkeypatch, position):
            run(config)
    again = run(config)
    assert decisions(config) == decisions(reference)
    assert [event.name for event in events_of(config)] == names
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_a_run_by_pls_ends_at_its_target_if_that_comes_first(digits, tmp_path):
    changes = PLS | {"prune__iterations": 9, "prune__flops_reduction": 0.02, "train__prune_epoch": 0}
    config = on_digits(tmp_path, digits, **changes)
    run(config)
    assert len(decisions(config)) == 1 and decisions(config)[0]["flops_reduction"] >= 0.02


@pytest.mark.parametrize("name", ["pls", "own_criteria:MeanActivation"])
def test_a_criterion_of_data_can_be_one_of_the_pool(digits, tmp_path, name):
    changes = {"prune__criteria": [name], "prune__flops_reduction": 0.02, "train__prune_epoch": 0, "train__epochs": 1}
    config = on_digits(tmp_path, digits, **changes)
    run(config)
    assert {decision["criterion"] for decision in decisions(config)} == {name}
    assert (tmp_path / "small" / "candidates" / "000001.parquet").is_file()
