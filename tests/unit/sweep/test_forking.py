"""A run that begins with what a run to a deeper target did ends as one that did it all itself."""

import dataclasses

import pytest
import torch
from fakes import Silent
from helpers import write_digits
from whole_runs import events_of, on_digits, power_cut

from laasp_ray import prune
from laasp_ray.errors import ConfigError, StoreError
from laasp_ray.run.forking import fork
from laasp_ray.store.storage import Storage
from laasp_ray.sweep.trajectory import Forks

SHALLOW = 0.06


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), side=16, train=60, test=12)


def run(config, progress=None):
    return prune(config, distributed=False, progress=progress or Silent())


def shallow(config, name="shallow"):
    return dataclasses.replace(config, name=name, prune=dataclasses.replace(config.prune, flops_reduction=SHALLOW))


def folder(config):
    return Storage.open(config.storage).child(config.name)


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory, digits):
    config = on_digits(tmp_path_factory.mktemp("trajectory"), digits, prune__exact_target=False)
    run(config, Forks(folder(config), [shallow(config)]))
    return config


def told(config):
    """What events say, without seconds and digests that contain names."""
    return [
        (event.name, {key: event.data.get(key) for key in ("decision", "step", "loss", "metrics", "position", "phase")})
        for event in events_of(config)
    ]


@pytest.mark.parametrize("prunes", [1, 3])
def test_it_ends_as_a_run_that_did_it_all_itself(tmp_path, trajectory, digits, prunes):
    """Of three prunes an iteration a run to the shallow target makes fewer in its last one."""
    config, settings = trajectory, {"prune__prunes_per_iteration": prunes, "prune__exact_target": False}
    if prunes > 1:
        config = on_digits(tmp_path / "deep", digits, **settings)
        run(config, Forks(folder(config), [shallow(config)]))
    again = run(shallow(config))
    alone = on_digits(tmp_path, digits, prune__flops_reduction=SHALLOW, **settings)
    result = run(alone)
    iterations = [sum(event.name == "iteration" for event in events_of(one)) for one in (shallow(config), config)]
    assert 0 < iterations[0] < iterations[1] or prunes > 1
    assert told(shallow(config)) == told(alone)
    assert again.summary["flops_reduction"] == result.summary["flops_reduction"]
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_it_stays_as_it_is_once_it_has_begun(trajectory):
    config = trajectory
    before = [event.name for event in events_of(shallow(config))]
    fork(folder(config), shallow(config))
    assert [event.name for event in events_of(shallow(config))] == before


def test_what_cannot_be_forked_is_told(tmp_path, trajectory, digits):
    config = trajectory
    with pytest.raises(StoreError, match=r"checkpoints/.* is not stored any more"):
        fork(folder(config), shallow(config, "late"))
    other = dataclasses.replace(shallow(config, "other"), seed=1)
    with pytest.raises(ConfigError, match=r"other cannot begin with .*: seed differ"):
        fork(folder(config), other)
    exact = dataclasses.replace(config.prune, exact_target=True)
    with pytest.raises(ConfigError, match=r"with prune\.exact_target a run to another target has other prunes"):
        fork(folder(config), dataclasses.replace(config, name="exact", prune=exact))
    parameters = dataclasses.replace(config.prune, flops_reduction=0.0, parameters_reduction=0.01)
    with pytest.raises(
        ConfigError, match=r"target for prune\.parameters_reduction, which the run in .* does not measure"
    ):
        fork(folder(config), dataclasses.replace(config, name="parameters", prune=parameters))
    deep = dataclasses.replace(config, name="deep", prune=dataclasses.replace(config.prune, flops_reduction=0.5))
    with pytest.raises(ConfigError, match=r"has not reached the targets of deep \(50\.0% of FLOPs\)"):
        fork(folder(config), deep)
    with pytest.raises(ConfigError, match=r"there is no run in .*nowhere"):
        fork(Storage.open(str(tmp_path / "nowhere")), shallow(config))


def test_a_fork_that_was_cut_off_is_made_again(tmp_path, trajectory, digits, monkeypatch):
    position = [event.name for event in events_of(trajectory)].index("iteration")
    config, names = on_digits(tmp_path, digits, prune__exact_target=False), []
    with power_cut(monkeypatch, position + 1):
        run(config)
    reached = events_of(config)
    assert reached[-1].name == "iteration"
    small = dataclasses.replace(
        config,
        name="small_target",
        prune=dataclasses.replace(config.prune, flops_reduction=reached[-1].data["decision"]["flops_reduction"]),
    )
    write = Storage.write

    def failing(self, name, data):
        if name.endswith("-start.json"):
            raise StoreError("the power is cut")
        names.append(name)
        write(self, name, data)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="the power is cut"):
        patch.setattr(Storage, "write", failing)
        fork(folder(config), small)
    assert any(name.startswith("journal/") for name in names)
    fork(folder(config), small)
    assert [event.name for event in events_of(small)] == [event.name for event in reached]
    assert run(small).summary["flops_reduction"] >= small.prune.flops_reduction


def test_a_run_that_was_cut_off_before_its_fork_makes_it_when_it_is_resumed(tmp_path, digits, monkeypatch):
    config = on_digits(tmp_path, digits, prune__exact_target=False)

    def failing(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("laasp_ray.sweep.trajectory.fork", failing)
        run(config, Forks(folder(config), [shallow(config)]))
    assert events_of(config)[-1].name == "iteration"
    run(config, Forks(folder(config), [shallow(config)]))
    assert events_of(shallow(config))[-1].name == "iteration"
