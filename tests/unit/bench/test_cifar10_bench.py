"""bench/cifar10.py: one budget for all, one base, one beginning; a rehearsal on digits."""

import cifar10
import pytest
from cifar10 import Budget
from helpers import write_digits
from methods import Chain, Place
from whole_runs import events_of

from laasp_ray.errors import ConfigError
from laasp_ray.records import RunState
from laasp_ray.run.state import next_training_phase

TINY = (
    "search.images=6",
    "train.batch_size=30",
    "prune.step=0.05",
    "data.image_size=16",
    "model.input_shape=[3,16,16]",
    "data.loader=torchvision",
    'model.arguments={"num_classes": 3}',
)
BUDGET = Budget(2, 1, "float32")


def rates(config, phase):
    return [epoch.learning_rate for epoch in next_training_phase(RunState(phase=phase), config).epochs]


@pytest.mark.parametrize("method", cifar10.COMPARED)
def test_all_methods_have_one_budget(tmp_path, method):
    place, budget = Place(tmp_path, tmp_path / "runs", ()), Budget(36, 6, "auto")
    end, middle = (cifar10.config_of(f"{when} {method}", 1, 0.5, place, budget) for when in cifar10.WHEN)
    for config in (end, middle):
        assert (config.prune.flops_reduction, config.prune.step, config.prune.fine_tune_every) == (0.5, 0.02, 0.1)
        assert (config.search.images, config.train.precision, config.seed) == (1000, "auto", 1)
        assert config.data.path == str(tmp_path / "cifar10_jpeg")
    assert end.train.pretrained == str(tmp_path / "runs" / "base-seed1.safetensors")
    # Half a cosine from 0.01 over 6 epochs: 0.01 x (1 + cos(i x 30 degrees)) / 2. From 0.1 over 42, pruned at 21.
    assert rates(end, "final") == pytest.approx([0.01, 0.00933013, 0.0075, 0.005, 0.0025, 0.00066987], rel=1e-4)
    assert rates(end, "fine-tune") == [0.01]
    assert middle.train.pretrained is None and rates(middle, "fine-tune") == pytest.approx([0.05])
    assert (len(rates(middle, "train")), len(rates(middle, "final"))) == (21, 21)
    assert len(rates(end, "final")) + 36 == 42
    assert end.prune.compensate == middle.prune.compensate == ("full" if method == "laasp_obs-made_up" else "off")


def test_settings_of_the_command_line_reach_all_runs_and_unknown_ones_are_named(tmp_path):
    place = Place(tmp_path, tmp_path, ("search.images=100",))
    assert cifar10.config_of("end l1", 0, 0.5, place, BUDGET).search.images == 100
    with pytest.raises(ConfigError, match=r"train\.precision"):
        cifar10.config_of("end l1", 0, 0.5, place, Budget(2, 1, "float16"))


def test_a_rehearsal(tmp_path):
    write_digits(tmp_path / "cifar10_jpeg", side=16, train=60, test=12)
    place = Place(tmp_path, tmp_path / "runs", TINY)
    cifar10.train_base(0, place, BUDGET)
    weights = cifar10.base_weights(0, place).read_bytes()
    cifar10.train_base(0, place, BUDGET)  # it is there
    assert cifar10.base_weights(0, place).read_bytes() == weights
    rows = [cifar10.run(Chain(f"end {method}", 0, (0.03,)), place, BUDGET) for method in ("l1", "uniform")]
    rows.append(cifar10.run(Chain("middle l1", 0, (0.03,)), place, BUDGET, ["middle uniform"]))
    rows.append(cifar10.run(Chain("middle uniform", 0, (0.03,)), place, BUDGET))
    assert [row.method for row in rows] == ["end l1", "end uniform", "middle l1", "middle uniform"]
    assert all(0.03 <= row.flops_reduction < 0.1 for row in rows)
    assert rows[0].top1_before == rows[1].top1_before  # the base
    first, copied = (cifar10.config_of(f"middle {name}", 0, 0.03, place, BUDGET) for name in ("l1", "uniform"))
    # One epoch of three before the prune, trained once: the same event in both, to its seconds.
    epochs = [[event.data for event in events_of(config) if event.name == "epoch"] for config in (first, copied)]
    assert [len(some) for some in epochs] == [3, 3] and epochs[0][0] == epochs[1][0]
    assert events_of(copied)[0].data["config"] == copied.to_dict()
