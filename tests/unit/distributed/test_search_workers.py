"""The queue of the search's workers: what is given to whom, and what happens to it when a worker is lost or late."""

import pytest
import ray as real_ray
from fake_ray import FakeRay

from laasp_ray.config import ClusterConfig
from laasp_ray.distributed import search_workers
from laasp_ray.distributed.cluster import plan_resources
from laasp_ray.distributed.search_workers import FIRST_LATE_S, LATE_S, NO_WORKER_S, Job, SearchWorkers
from laasp_ray.errors import ConfigError, MemoryShortError, SearchError


def made(monkeypatch, devices, room=None):
    cluster = FakeRay(devices, room)
    monkeypatch.setattr(search_workers, "ray", cluster)
    monkeypatch.setattr(search_workers, "kill_at", lambda place: cluster.killed.append(place.pid))
    share = plan_resources({"CPU": devices}, ClusterConfig())
    return SearchWorkers(share, cluster.clock), cluster


def job(function, *arguments, **more):
    return Job(function, arguments, "a square", "ask for less", **more)


def square(number):
    return number * number


def all_of(workers, jobs):
    for one in jobs:
        workers.submit(one)
    return [workers.collect() for _ in jobs]


@pytest.mark.parametrize("devices", [1, 2, 5])
def test_every_job_is_done_once_whatever_the_workers(monkeypatch, devices):
    workers, cluster = made(monkeypatch, devices)
    jobs = [job(square, number) for number in range(12)]
    found = all_of(workers, jobs)
    assert {one.result() for one in found} == {number * number for number in range(12)}
    assert len(cluster.actors) == devices == workers.slots and len(set(map(id, found))) == 12
    workers.close()
    assert all(actor.dead for actor in cluster.actors)


def test_values_come_in_order_and_no_more_are_asked_for_than_ahead(monkeypatch):
    workers, _ = made(monkeypatch, 2)
    asked = []
    jobs = (asked.append(number) or job(square, number) for number in range(6))
    values = workers.in_order(jobs, ahead=3)
    assert next(values) == 0 and asked == [0, 1, 2]
    assert next(values) == 1 and asked == [0, 1, 2, 3]
    assert list(values) == [4, 9, 16, 25]


def test_what_a_job_raises_is_its_result(monkeypatch):
    workers, _ = made(monkeypatch, 1)
    with pytest.raises(ZeroDivisionError):
        workers.call(job(lambda: 1 / 0))
    assert workers.call(job(square, 3)) == 9  # nothing of the first is left


def test_the_work_of_a_lost_worker_goes_to_others_and_another_is_started(monkeypatch, caplog):
    workers, cluster = made(monkeypatch, 2)

    def lose_the_first():
        cluster.kill(cluster.actors[0]) if not cluster.actors[0].dead else None
        raise real_ray.exceptions.RayActorError()

    first = True

    def once_lost(number):
        nonlocal first
        if first:
            first = False
            lose_the_first()
        return square(number)

    found = all_of(workers, [job(once_lost, number) for number in range(6)])
    assert sorted(one.result() for one in found) == [0, 1, 4, 9, 16, 25]
    assert len(cluster.actors) == 3 and "a search worker is lost" in caplog.text


def test_a_job_whose_workers_are_lost_again_and_again_is_given_up(monkeypatch):
    workers, cluster = made(monkeypatch, 1)

    def deadly():
        raise real_ray.exceptions.RayActorError()

    with pytest.raises(SearchError, match=r"a square was not finished \(.* is tried 6 times\): .*memory, ask for less"):
        workers.call(job(deadly))
    assert len(cluster.actors) == 7  # each of six tries cost one


def test_memory_that_is_short_is_tried_again(monkeypatch):
    workers, _ = made(monkeypatch, 2)
    tries = []

    def short(enough):
        tries.append(1)
        if len(tries) < enough:
            raise MemoryShortError("short")
        return len(tries)

    assert workers.call(job(short, 4)) == 4
    tries.clear()
    with pytest.raises(MemoryShortError):
        workers.call(job(short, 100))
    assert len(tries) == 6


def test_a_worker_that_hangs_is_killed_and_its_work_done_by_others(monkeypatch, caplog):
    workers, cluster = made(monkeypatch, 2)
    all_of(workers, [job(square, number) for number in range(4)])  # so that it is known what takes how long
    cluster.actors[0].hangs = True
    begun = cluster.now
    found = all_of(workers, [job(square, number) for number in range(8)])
    assert sorted(one.result() for one in found) == [number * number for number in range(8)]
    # All of it was repeated by the other one long before the hanging one was given up.
    assert cluster.now - begun < LATE_S
    cluster.actors[1].hangs = True
    found = all_of(workers, [job(square, number) for number in range(3)])
    assert sorted(one.result() for one in found) == [0, 1, 4]
    assert LATE_S < cluster.now - begun < FIRST_LATE_S
    assert 1001 in cluster.killed and "no answer for" in caplog.text


def test_a_search_without_a_worker_says_so_and_ends_at_last(monkeypatch, caplog):
    workers, cluster = made(monkeypatch, 2, room=0)
    with pytest.raises(SearchError, match=r"no search worker came up for 30 min; one wants .*num_cpus.*same command"):
        workers.call(job(square, 3))
    assert cluster.now > NO_WORKER_S
    assert sum("no search worker has come up" in record.message for record in caplog.records) >= 20


def test_a_cluster_that_grows_is_used(monkeypatch):
    workers, cluster = made(monkeypatch, 1)
    workers.call(job(square, 3))
    cluster.devices = cluster.room = 3
    cluster.now += 60
    workers.call(job(square, 3))
    assert len(cluster.actors) == 3


def test_a_worker_that_is_refused_for_its_versions_ends_the_search_with_the_reason(monkeypatch):
    workers, cluster = made(monkeypatch, 1)
    workers.submit(job(square, 1))
    refusal = ConfigError("node 10.0.0.7 has torch 2.14.0 (the driver: 2.15.0)")

    def refuse(reference):
        raise real_ray.exceptions.RayTaskError("place", "traceback", refusal)

    monkeypatch.setattr(cluster, "get", refuse)
    with pytest.raises(ConfigError, match=r"node 10\.0\.0\.7 has torch"):
        workers.collect()


def test_workers_that_share_gpus_are_beside_the_runs_own_trainers(monkeypatch):
    _, cluster = made(monkeypatch, 5)
    share = plan_resources({"CPU": 8, "GPU": 5}, ClusterConfig(workers=3))
    a, b = "a" * 56, "b" * 56
    workers = SearchWorkers(share, cluster.clock, trainers=lambda: [b, a, b])
    workers.call(job(square, 3))
    placed = [(actor.options["num_gpus"], node_of(actor)) for actor in cluster.actors]
    assert placed == [(0.4, b), (0.4, b), (0.4, a), (1.0, None), (1.0, None)]
    workers._replace(workers._workers[1])
    assert (cluster.actors[-1].options["num_gpus"], node_of(cluster.actors[-1])) == (0.4, b)


def node_of(actor):
    where = actor.options["scheduling_strategy"]
    return None if where == "SPREAD" else where.node_id
