"""Groups that are lost, shrink and grow, without Ray: what the trainer does with what a group says."""

import logging
from types import SimpleNamespace

import pytest
import torch
from helpers import small_run

from laasp_ray.distributed import trainer as trainer_module
from laasp_ray.distributed.cluster import ResourcePlan
from laasp_ray.distributed.group import GroupLostError, NoRoomError, room_for_trainers
from laasp_ray.distributed.trainer import RayTrainer
from laasp_ray.distributed.transfer import pack
from laasp_ray.errors import DataError, TrainingError
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.plan import Plan
from laasp_ray.records import Metrics
from laasp_ray.train.loop import EpochPlan, EpochResult, PhaseResult, TrainingPhase

DONE = PhaseResult(Metrics(loss=1.0, top1=0.5, top5=1.0, images=4), 0.1, (), "fake")
LOST = GroupLostError("rank 1, process 7 on 10.0.0.1 (cpu): no heartbeat for 61 s")
PLANS = tuple(EpochPlan(epoch=epoch, data_epoch=epoch, learning_rate=0.1) for epoch in range(3))
PHASE = TrainingPhase(number=4, phase="final", epochs=PLANS)
SHARE = ResourcePlan(workers=4, gpus=4, trainer_resources={"GPU": 0.6}, task_options={})


class Cluster:
    """Groups whose workers do what `script` says: a list for each group of what its mailbox gives, or raises.

    `rooms` are the numbers of trainers that there is room for, at each look; the last one stays.
    """

    def __init__(self, monkeypatch, tmp_path, scripts, rooms=(4,), failures=1):
        self.scripts, self.rooms = [list(script) for script in scripts], list(rooms)
        self.groups, self.commands, self.abandoned, self.room_made = [], [], 0, 0
        monkeypatch.setattr(trainer_module, "WorkerGroup", lambda settings, workers: Group(self, workers))
        monkeypatch.setattr(trainer_module, "room_for_trainers", lambda nodes, share: self.room())
        monkeypatch.setattr(trainer_module, "ray", SimpleNamespace(put=lambda value: value, nodes=list))
        monkeypatch.setattr(trainer_module.time, "sleep", lambda seconds: None)
        config = small_run(tmp_path, cluster__worker_failures=failures)
        self.faults = []
        self.trainer = RayTrainer(None, config, SHARE, "", ("", ""), self.faults.append)
        self.trainer._make_room = lambda: setattr(self, "room_made", self.room_made + 1)
        self.heard = []

    def room(self):
        return self.rooms.pop(0) if len(self.rooms) > 1 else self.rooms[0]

    def run(self):
        state = NetworkState(Plan.empty(), {"w": torch.tensor([0.0])})
        return self.trainer.run(state, {}, PHASE, lambda epoch: self.heard.append(epoch.position))


class Group:
    def __init__(self, cluster, workers):
        self.cluster, self.workers, self.script = cluster, workers, cluster.scripts.pop(0)
        cluster.groups.append(workers)
        self.mailbox = SimpleNamespace(
            submit=SimpleNamespace(remote=lambda number, payload: ("submit", payload)),
            take=SimpleNamespace(remote=lambda: ("take", None)),
        )

    def wait_until_up(self, room, when_late):
        if self.script and self.script[0] in (NoRoomError, KeyboardInterrupt):
            raise self.script[0]

    def begin(self):
        pass

    def ask(self, reference):
        kind, payload = reference
        if kind == "submit":
            arrays, _ = payload.arrays[0]
            self.cluster.commands.append((payload.training_phase.done, float(arrays["w"][0])))
            return None
        given = self.script.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    def abandon(self):
        self.cluster.abandoned += 1


def epoch(position, seconds=1.0):
    """What rank 0 posts after an epoch: the weights are its position + 1."""
    done = EpochResult(
        position=position,
        plan=PLANS[position],
        loss=1.0,
        top1=0.5,
        images=4,
        seconds=seconds,
        tensors={},
        optimizer_state={},
        unreadable=(),
    )
    return ("epoch", (pack({"w": torch.tensor([position + 1.0])}), pack({}), done))


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    return lambda *scripts, **more: Cluster(monkeypatch, tmp_path, scripts, **more)


def test_a_lost_group_is_followed_by_one_that_goes_on_after_the_last_epoch(cluster):
    made = cluster([epoch(0), LOST], [epoch(1), LOST], [epoch(2), ("done", DONE)])
    assert made.run() is DONE
    assert made.heard == [0, 1, 2] and made.abandoned == 2
    assert made.commands == [(0, 0.0), (1, 1.0), (2, 2.0)]  # epochs done, and their weights
    assert made.faults == [f"the worker group was lost ({LOST})"] * 2


@pytest.mark.parametrize(("failures", "times"), [(0, "once"), (2, "3 times")])
def test_losses_without_an_epoch_in_between_end_it_with_the_last_words(cluster, failures, times):
    said = ("complaint", "rank 2: KeyError: 'x'\n  line 3")
    made = cluster(*[[LOST]] * failures, [said, LOST], failures=failures)
    expected = rf"training phase 4 \(final\): the workers were lost {times} without .* the last said: rank 2: KeyError"
    with pytest.raises(TrainingError, match=expected):
        made.run()
    assert made.abandoned == failures + 1


def test_a_node_that_is_gone_leaves_a_smaller_group(cluster, caplog):
    caplog.set_level(logging.WARNING)
    made = cluster([epoch(0), LOST], [epoch(1), epoch(2), ("done", DONE)], rooms=[4, 3, 3])
    made.run()
    assert made.groups == [4, 3] and made.heard == [0, 1, 2]
    assert "there is room for 3 of 4 trainers" in caplog.text and str(LOST) in caplog.text


def test_a_node_that_goes_while_a_group_starts_is_noticed(cluster):
    made = cluster([NoRoomError], [epoch(0), epoch(1), epoch(2), ("done", DONE)], rooms=[4, 2])
    made.run()
    assert made.groups == [4, 2]


def test_it_grows_at_an_epochs_end_if_enough_is_left(cluster):
    slow = [epoch(0, seconds=100), epoch(1, seconds=100), epoch(2, seconds=100), ("done", DONE)]
    made = cluster(slow[:1], slow[1:], rooms=[2, 4])  # after the first epoch two of 100 s are left
    made.run()
    assert made.groups == [2, 4] and made.commands == [(0, 0.0), (1, 1.0)]
    assert (made.room_made, made.abandoned) == (1, 1)
    quick = [epoch(0, seconds=50), epoch(1, seconds=50), epoch(2, seconds=50), ("done", DONE)]
    assert 2 * 50 < trainer_module.WORTH_GROWING_S <= 2 * 100
    made = cluster(quick, rooms=[2, 4])
    made.run()
    assert made.groups == [2]


def test_without_any_room_it_waits_saying_so_and_ends_at_last(cluster, monkeypatch, caplog):
    made = cluster(rooms=[0])
    now = [0.0]
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(trainer_module.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 50 * seconds))
    with pytest.raises(TrainingError, match=r"no room for a trainer for 30 min; one wants \{'GPU': 0\.6\}; start the"):
        made.run()
    assert "no room for a trainer for 100 s" in caplog.text


def test_an_error_in_training_is_raised_as_what_it_is(cluster):
    made = cluster([("failed", DataError("on node 10.0.0.2: no such folder"))])
    with pytest.raises(DataError, match=r"on node 10\.0\.0\.2"):
        made.run()
    assert made.abandoned == 1


def test_room_is_that_of_nodes_that_are_alive():
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 2.5}},
    ]
    assert room_for_trainers(nodes, SHARE) == 4
    on_cpus = ResourcePlan(workers=2, gpus=0, trainer_resources={"CPU": 0.05}, task_options={})
    assert room_for_trainers(nodes, on_cpus) == 10


def test_a_stop_while_a_group_comes_up_is_not_kept_waiting(cluster):
    # Ending the group may take a minute, and Ray kills a stopped job's driver after three seconds.
    made = cluster([KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert made.abandoned == 0
    made.trainer.close()
    assert made.abandoned == 1
