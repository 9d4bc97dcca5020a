"""What identifies the user's own objects in the journal."""

import dataclasses
import functools
import subprocess
import sys

import own_examples
import pytest
import torch
from run_events import run_started

from laasp_ray.data.examples.nested import digest_of
from laasp_ray.errors import ConfigError
from laasp_ray.run.beginning import check_same_task
from laasp_ray.tasks import Mean, OwnData, TopK
from laasp_ray.tasks.identity import identity_of
from laasp_ray.tasks.own import OutputLossTask


def scaled(factor):
    return lambda outputs, targets: factor * (outputs - targets)


class Weighted:
    def __init__(self, weights):
        self.weights = torch.tensor(weights)

    def __call__(self, outputs, targets):
        return outputs * self.weights


def test_what_can_be_imported_is_known_by_its_path():
    assert identity_of(own_examples.bce) == "own_examples:bce"
    assert identity_of(TopK) == "laasp_ray.tasks.metrics:TopK"
    assert identity_of(None) == "none"


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (scaled(2), scaled(2), scaled(3)),
        (
            functools.partial(own_examples.data, count=3),
            functools.partial(own_examples.data, count=3),
            functools.partial(own_examples.data, count=4),
        ),
        (Weighted([1.0, 2.0]), Weighted([1.0, 2.0]), Weighted([1.0, 3.0])),
        (Mean(own_examples.right), Mean(own_examples.right), Mean(own_examples.right, higher_is_better=False)),
        (TopK(1), TopK(1), TopK(5)),
        (lambda a, b: a - b, lambda a, b: a - b, lambda a, b: b - a),
    ],
)
def test_equal_objects_have_equal_identities(one, same, other):
    assert identity_of(one) == identity_of(same) != identity_of(other)


def test_it_is_the_same_in_another_process():
    code = (
        "import functools, own_examples; from laasp_ray.tasks.identity import identity_of\n"
        "def local(a, b):\n    return {1, 2, 3}, {'x': 1.5, 'y': (a, b)}, frozenset('abc')\n"
        "print([identity_of(part) for part in (local, functools.partial(local, b=2), own_examples.WRONG)])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(seed)
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def environment(seed):
    import os

    paths = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}


def test_the_parts_of_a_task():
    own = OwnData(own_examples.data, {"count": 12})
    task = OutputLossTask(own, loss=own_examples.bce, metrics_by_name={"top": TopK()})
    assert task.identity()["loss"] == "own_examples:bce"
    assert set(task.identity()["data"]) == {"factory", "arguments", "collate"}
    assert task.identity()["metrics"]["top"].startswith("laasp_ray.tasks.metrics:TopK ")
    assert OwnData(own_examples.data, {"count": 13}) != own


def test_the_order_of_metrics_is_part_of_the_identity():
    """The first one decides which epoch is the best. With one metric or none there is no order."""
    metrics = {"top": TopK(), "wrong": own_examples.WRONG}
    there, here = (
        OutputLossTask(loss=own_examples.bce, metrics_by_name=dict(ordered))
        for ordered in (metrics.items(), reversed(metrics.items()))
    )
    start = run_started(task=there.identity())
    check_same_task(start, there)
    message = r"another task \(order_of_metrics: top, wrong there, wrong, top here\): give the same"
    with pytest.raises(ConfigError, match=message):
        check_same_task(start, here)
    alone = OutputLossTask(loss=own_examples.bce, metrics_by_name={"top": TopK()})
    assert set(alone.identity()) == {"loss", "metrics"}


@dataclasses.dataclass
class Sample:
    """A type that another process knows under another module's name, as a script's is."""

    image: torch.Tensor
    name: str


def test_an_object_s_digest_is_of_its_values():
    one, same, other = (Sample(torch.ones(2), name) for name in ("a", "a", "b"))
    assert digest_of(one) == digest_of(same) != digest_of(other)
    elsewhere = dataclasses.make_dataclass("Sample", ["image", "name"])
    elsewhere.__module__ = "nowhere_to_be_imported"
    assert digest_of(elsewhere(torch.ones(2), "a")) == digest_of(one)
