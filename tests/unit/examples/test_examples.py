"""The scripts of examples/, on fewer pictures; whole in the exhaustive tests."""

import dataclasses
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import Silent

from laasp_ray import prune
from laasp_ray.tasks import OwnData

FOLDER = Path(__file__).parents[3] / "examples"
LEARNS = {
    "multi_label": ("F1", 0.3),
    "segmentation": ("mIoU", 0.6),
    "segmentation lraspp": ("mIoU", 0.3),
    "detection": ("AP50", 0.1),
    "regression": ("mean absolute error", 5.0),
}
"""Script -> its primary metric, and what it must pass (the error: stay below)."""


@pytest.fixture
def example(monkeypatch):
    """Imports a script of the folder. Its modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in FOLDER.glob("*.py")} - before:
        sys.modules.pop(name, None)


def small(example, name, storage, network, images, **changes):
    """The run of a script with so many pictures and two epochs."""
    script, settings = example(name), example("settings").settings
    shape = tuple(script.data("train", 10)[0][0].shape)
    config = settings(name, f"{name}:network", shape, epochs=2, prune_epoch=1, batch_size=10, **changes)
    config = dataclasses.replace(
        config,
        storage=str(storage),
        search=dataclasses.replace(config.search, images=8, batch_size=4),
        prune=dataclasses.replace(config.prune, flops_reduction=0.05, criteria=("l1",)),
    )
    own = OwnData(functools.partial(script.data, images=images), collate=getattr(script, "collate", None))
    loss = script.SquaredError() if name == "regression" else script.loss
    result = prune(
        config, network(script), data=own, loss=loss, metrics=script.METRICS, distributed=False, progress=Silent()
    )
    assert result.summary["flops_reduction"] >= 0.05
    assert list(result.summary["metrics"]["values"]) == list(script.METRICS)
    return result, script, shape


@pytest.mark.parametrize(
    ("name", "network", "changes"),
    [
        ("multi_label", lambda script: script.network(), {}),
        pytest.param("segmentation", lambda script: script.unet(4), {}, marks=pytest.mark.exhaustive),
        ("regression", lambda script: script.network(), {"learning_rate": 0.001, "distill": 0.3}),
    ],
)
def test_it_runs(example, tmp_path, name, network, changes):
    result, _, shape = small(example, name, tmp_path, network, 20, **changes)
    assert torch.isfinite(result.model(torch.zeros(1, *shape))).all()


def test_detection_runs_and_keeps_torchvisions_detections(example, tmp_path):
    result, script, shape = small(
        example, "detection", tmp_path, lambda script: script.network(), 20, learning_rate=0.02
    )
    (found,) = result.model(torch.zeros(1, *shape))
    assert set(found) == {"boxes", "scores", "labels"}
    assert type(result.model) is type(script.network())


@pytest.mark.exhaustive
def test_lraspp_runs(example, tmp_path):
    result, _, shape = small(example, "segmentation", tmp_path, lambda script: script.lraspp(), 20)
    assert result.model(torch.zeros(1, *shape))["out"].shape == (1, 3, *shape[1:])


def test_detections_loss_is_torchvisions_for_a_picture_alone(example):
    """In training mode the network's own sum of losses is that of `loss`, picture by picture."""
    script = example("detection")
    torch.manual_seed(0)
    model, pairs = script.network().train(), [script.data("train")[index] for index in range(3)]
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.eval()
    losses = script.loss(model, script.collate(pairs))
    for value, (picture, target) in zip(losses, pairs, strict=True):
        expected = sum(model([picture], [target]).values())
        assert float(value) == pytest.approx(float(expected), rel=1e-5)


def test_average_precision_by_hand(example):
    """One class, two boxes there: a right detection at 0.9, a wrong one at 0.8, a right one at 0.7.

    Precision is 1 up to a recall of 1/2, and 2/3 from there on: (1 + 2/3) / 2. The other class has nothing: 0.
    """
    script = example("detection")
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    there = {"boxes": boxes, "labels": torch.tensor([1, 1])}
    found = {
        "boxes": torch.cat([boxes[:1], torch.tensor([[40.0, 40.0, 50.0, 50.0]]), boxes[1:]]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "labels": torch.tensor([1, 1, 1]),
    }
    metric = script.AveragePrecision()
    assert metric.value(metric.sums([found], [there])) == pytest.approx((1 + 2 / 3) / 2 / 2)
    twice = {
        key: torch.cat([found[key], found[key]]) for key in found
    }  # a box counts once, the second time it is wrong
    assert metric.value(metric.sums([twice], [there])) < metric.value(metric.sums([found], [there]))


def test_mean_iou_and_f1_by_hand(example):
    iou, f1 = example("segmentation").MeanIoU(), example("multi_label").F1()
    masks = torch.tensor([[[0, 1], [1, 2]]])
    outputs = torch.nn.functional.one_hot(torch.tensor([[[0, 1], [2, 2]]]), 3).permute(0, 3, 1, 2).float()
    assert iou.value(iou.sums(outputs, masks)) == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    found, there = torch.tensor([[1.0, 1.0, -1.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    assert f1.value(f1.sums(found, there).double()) == 0.5


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", LEARNS)
def test_the_whole_script_learns(command, tmp_path):
    script, *arguments = command.split()
    ran = subprocess.run(
        [sys.executable, str(FOLDER / f"{script}.py"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    metric, bar = LEARNS[command]
    value = eval(ran.stdout.strip().splitlines()[-1])["values"][metric]
    assert value < bar if script == "regression" else value > bar
