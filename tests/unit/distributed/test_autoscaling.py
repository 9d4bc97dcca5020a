"""What a run asks the autoscaler for, how long it waits, and what it says. A cluster is a list of device counts."""

import json
import logging

import pytest

from laasp_ray.config import ClusterConfig
from laasp_ray.distributed import autoscaling
from laasp_ray.errors import ConfigError


class Cluster:
    """A cluster whose number of devices at each look is the next of `counts`; the last one stays."""

    def __init__(self, monkeypatch, *counts, kind="GPU"):
        self.counts, self.kind, self.asked, self.now = list(counts), kind, [], 0.0
        self.impossible = lambda: False
        monkeypatch.setattr(autoscaling, "_is_impossible", lambda: self.impossible())
        monkeypatch.setattr(autoscaling, "has_autoscaler", lambda: True)
        monkeypatch.setattr(autoscaling, "ray", self)
        monkeypatch.setattr(autoscaling, "request_resources", lambda bundles: self.asked.append(bundles))
        monkeypatch.setattr(autoscaling.time, "sleep", self.sleep)
        monkeypatch.setattr(autoscaling.time, "monotonic", lambda: self.now)

    def sleep(self, seconds):
        self.now += seconds

    def cluster_resources(self):
        now = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
        others = {"CPU": 8.0} if self.kind == "GPU" else {}
        return others | ({self.kind: float(now)} if now else {})

    def nodes(self):
        return [{"Alive": True}, {"Alive": True}, {"Alive": False}]


def test_it_asks_waits_saying_so_and_lets_go(monkeypatch, caplog):
    cluster = Cluster(monkeypatch, 0, 1, 1, 4)
    caplog.set_level(logging.WARNING)
    with autoscaling.with_devices({"CPU": 8.0}, ClusterConfig(gpus=4), grows=True) as resources:
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
        rf"cluster\.gpus is 4, and after 2 min the cluster has {there} GPUs on 2 nodes: {remedy} to use what is there, "
        r"or raise cluster\.wait_minutes"
    )
    with pytest.raises(ConfigError, match=expected):  # noqa: SIM117
        with autoscaling.with_devices({"CPU": 8.0}, ClusterConfig(gpus=4, wait_minutes=2), grows=True):
            pytest.fail("the GPUs are not there")
    assert cluster.asked[-1] == [] and 120 <= cluster.now <= 122


def test_a_cluster_of_this_process_does_not_grow(monkeypatch):
    cluster = Cluster(monkeypatch, 1)
    with pytest.raises(ConfigError, match=r"cluster\.gpus is 2, but this machine has 1: .*--ray-address"):  # noqa: SIM117
        with autoscaling.with_devices({"GPU": 1.0}, ClusterConfig(gpus=2), grows=False):
            pytest.fail("it has one")
    assert cluster.asked == []


def test_without_cluster_gpus_nothing_is_asked(monkeypatch):
    cluster = Cluster(monkeypatch, 1)
    with autoscaling.with_devices({"GPU": 1.0}, ClusterConfig(), grows=True) as resources:
        assert resources == {"GPU": 1.0}
    assert cluster.asked == []


def test_more_workers_than_gpus_asked_for_are_refused():
    with pytest.raises(ConfigError, match=r"cluster\.workers is 3, must be at most cluster\.gpus \(2\)"):
        ClusterConfig(gpus=2, workers=3)


def test_without_gpus_a_cpu_is_asked_for_each_worker(monkeypatch, caplog):
    cluster = Cluster(monkeypatch, 0, 1, 2, kind="CPU")
    with autoscaling.with_devices({}, ClusterConfig(workers=2), grows=True) as resources:
        assert resources == {"CPU": 2.0}
    assert cluster.asked == [[{"CPU": 1}] * 2, []]
    assert caplog.messages == [
        "the cluster has 0 of 2 CPUs; its autoscaler is asked for the others (for 0 s now)",
    ]


def test_a_run_that_is_resumed_begins_with_fewer_cpus_and_asks_for_all(monkeypatch):
    cluster = Cluster(monkeypatch, 0, 1, kind="CPU")
    with autoscaling.with_devices({}, ClusterConfig(workers=3), 3, grows=True) as resources:
        assert resources == {"CPU": 1.0}
    assert cluster.asked == [[{"CPU": 1}] * 3, []]


@pytest.mark.parametrize(
    ("resources", "config", "grows", "autoscaler"),
    [
        ({"CPU": 1.0}, ClusterConfig(workers=2), False, True),  # a cluster of this process
        ({"CPU": 1.0}, ClusterConfig(workers=2), True, False),  # more than there are is refused elsewhere, at once
        ({"CPU": 1.0}, ClusterConfig(), True, True),
        ({"CPU": 1.0, "GPU": 1.0}, ClusterConfig(workers=2), True, True),
    ],
)
def test_cpus_are_asked_for_only_where_they_may_come(monkeypatch, resources, config, grows, autoscaler):
    cluster = Cluster(monkeypatch, 9, kind="CPU")
    monkeypatch.setattr(autoscaling, "has_autoscaler", lambda: autoscaler)
    with autoscaling.with_devices(resources, config, grows=grows) as seen:
        assert seen is resources
    assert cluster.asked == []


def test_what_the_autoscaler_calls_impossible_is_given_up_soon(monkeypatch):
    cluster = Cluster(monkeypatch, 1, kind="CPU")
    cluster.impossible = lambda: cluster.now >= 20  # another run's nodes may have been in the way before
    with pytest.raises(ConfigError, match=r"cluster\.workers is 5, but .* never have so many CPUs \(there are 1 now\)"):  # noqa: SIM117
        with autoscaling.with_devices({"CPU": 1.0}, ClusterConfig(workers=5), grows=True):
            pytest.fail("they are not there")
    assert cluster.asked[-1] == [] and 48 <= cluster.now <= 52


def test_a_cluster_that_is_gone_does_not_hide_the_error_of_the_run(monkeypatch, caplog):
    Cluster(monkeypatch, 1)

    def request(bundles):
        if not bundles:
            raise ConnectionError("no head")

    monkeypatch.setattr(autoscaling, "request_resources", request)
    with pytest.raises(ZeroDivisionError):  # noqa: SIM117
        with autoscaling.with_devices({"GPU": 1.0}, ClusterConfig(gpus=1), grows=True):
            _ = 1 / 0
    assert caplog.messages == ["the autoscaler could not be asked to let the GPUs go: no head"]


@pytest.mark.parametrize(
    ("types", "expected"), [({"ab": "node_ab"}, False), ({"ab": "ray.head.default"}, True), ({}, False), (None, False)]
)
def test_the_first_autoscaler_is_known_by_its_node_types(monkeypatch, types, expected):
    report = json.dumps({"autoscaler_report": {"node_type_mapping": types}}).encode()
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", {b"__autoscaling_status": report}.get)
    monkeypatch.setattr(autoscaling, "_state_of_autoscaler", lambda: None)
    assert autoscaling.has_autoscaler() is expected
