"""What a run asks the autoscaler for, how long it waits, and what it says. A cluster is a list of its GPUs in time."""

import logging

import pytest

from laasp_ray.config import ClusterConfig
from laasp_ray.distributed import autoscaling
from laasp_ray.errors import ConfigError


class Cluster:
    """A cluster whose number of GPUs at each look is the next of `gpus`; the last one stays."""

    def __init__(self, monkeypatch, *gpus):
        self.gpus, self.asked, self.now = list(gpus), [], 0.0
        monkeypatch.setattr(autoscaling, "ray", self)
        monkeypatch.setattr(autoscaling, "request_resources", lambda bundles: self.asked.append(bundles))
        monkeypatch.setattr(autoscaling.time, "sleep", self.sleep)
        monkeypatch.setattr(autoscaling.time, "monotonic", lambda: self.now)

    def sleep(self, seconds):
        self.now += seconds

    def cluster_resources(self):
        now = self.gpus.pop(0) if len(self.gpus) > 1 else self.gpus[0]
        return {"CPU": 8.0, "GPU": float(now)} if now else {"CPU": 8.0}

    def nodes(self):
        return [{"Alive": True}, {"Alive": True}, {"Alive": False}]


def test_it_asks_waits_saying_so_and_lets_go(monkeypatch, caplog):
    cluster = Cluster(monkeypatch, 0, 1, 1, 4)
    caplog.set_level(logging.WARNING)
    with autoscaling.with_gpus({"CPU": 8.0}, ClusterConfig(gpus=4), grows=True) as resources:
        assert resources == {"CPU": 8.0, "GPU": 4.0}
        assert cluster.asked == [[{"GPU": 1}] * 4]
    assert cluster.asked == [[{"GPU": 1}] * 4, []]
    assert [record.getMessage() for record in caplog.records] == [
        "the cluster has 0 of 4 GPUs; its autoscaler is asked for the others (for 0 s now)"
    ]


@pytest.mark.parametrize(
    ("there", "remedy"), [(3, "set cluster.gpus=3"), (0, "add nodes with GPUs, or set cluster.gpus=0")]
)
def test_what_does_not_come_is_told_with_what_is_there(monkeypatch, there, remedy):
    cluster = Cluster(monkeypatch, there)
    expected = (
        rf"cluster\.gpus is 4, and after 2 min the cluster has {there} on 2 nodes: {remedy} to use what is there, or "
        r"raise cluster\.wait_minutes"
    )
    with pytest.raises(ConfigError, match=expected):  # noqa: SIM117
        with autoscaling.with_gpus({"CPU": 8.0}, ClusterConfig(gpus=4, wait_minutes=2), grows=True):
            pytest.fail("the GPUs are not there")
    assert cluster.asked[-1] == [] and 120 <= cluster.now <= 122


def test_a_cluster_of_this_process_does_not_grow(monkeypatch):
    cluster = Cluster(monkeypatch, 1)
    with pytest.raises(ConfigError, match=r"cluster\.gpus is 2, but this machine has 1: .*--ray-address"):  # noqa: SIM117
        with autoscaling.with_gpus({"GPU": 1.0}, ClusterConfig(gpus=2), grows=False):
            pytest.fail("it has one")
    assert cluster.asked == []


def test_without_cluster_gpus_nothing_is_asked(monkeypatch):
    cluster = Cluster(monkeypatch, 1)
    with autoscaling.with_gpus({"GPU": 1.0}, ClusterConfig(), grows=True) as resources:
        assert resources == {"GPU": 1.0}
    assert cluster.asked == []


def test_more_workers_than_gpus_asked_for_are_refused():
    with pytest.raises(ConfigError, match=r"cluster\.workers is 3, must be at most cluster\.gpus \(2\)"):
        ClusterConfig(gpus=2, workers=3)
