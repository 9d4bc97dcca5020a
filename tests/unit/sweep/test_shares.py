"""How runs share a cluster."""

import pytest

from laasp_ray.config import ClusterConfig
from laasp_ray.distributed.cluster import plan_resources
from laasp_ray.distributed.search_workers import slots_of
from laasp_ray.errors import ConfigError
from laasp_ray.sweep.shares import share_out


def test_one_run_at_a_time_has_the_cluster_as_a_run_of_its_own_would():
    eight = {"CPU": 64, "GPU": 8}
    shares = share_out(eight, ClusterConfig(), 4)
    assert shares.slots == 1
    assert plan_resources(eight, shares.cluster) == plan_resources(eight, ClusterConfig())
    two = {"CPU": 2}
    assert share_out(two, ClusterConfig(), 4).slots == 1
    assert plan_resources(two, share_out(two, ClusterConfig(), 4).cluster) == plan_resources(two, ClusterConfig())


def test_gpus_are_divided_so_that_trainers_and_the_search_fit_beside_each_other():
    eight = {"CPU": 64, "GPU": 8}
    shares = share_out(eight, ClusterConfig(workers=2), 9)
    assert (shares.slots, shares.cluster.search_workers) == (4, 2)
    plan = plan_resources(eight, shares.cluster)
    assert (plan.workers, slots_of(eight, plan)) == (2, 2)
    three = share_out(eight, ClusterConfig(workers=2), 3)
    assert (three.slots, three.cluster.search_workers) == (3, 4)  # two other runs have four of eight
    assert share_out(eight, ClusterConfig(workers=2), 9, concurrent=2).cluster.search_workers == 6


def test_a_run_that_nothing_runs_beside_searches_on_the_whole_cluster():
    eight = {"CPU": 64, "GPU": 8}
    shares = share_out(eight, ClusterConfig(workers=2), 9)
    plan = plan_resources(eight, shares.alone)
    assert (plan.workers, slots_of(eight, plan)) == (2, 8)
    assert share_out(eight, ClusterConfig(workers=2, search_workers=3), 9).alone.search_workers == 3
    alone = share_out({"CPU": 8}, ClusterConfig(workers=1), 4, all_search=True).alone
    assert (alone.search_workers, alone.threads) == (0, 2)  # sums depend on threads: as all others have


def test_cpus_are_divided_by_threads_and_the_search_has_all():
    shares = share_out({"CPU": 8}, ClusterConfig(workers=1), 4)
    assert (shares.slots, shares.cluster.threads, shares.cluster.search_workers) == (4, 2, 0)
    plan = plan_resources({"CPU": 8}, shares.cluster)
    assert (plan.workers, plan.trainer_threads, slots_of({"CPU": 8}, plan)) == (1, 2, 8)
    held = 8 * plan.task_options["num_cpus"] + 4 * plan.trainer_resources["CPU"]
    assert held <= 8


def test_more_runs_than_fit_are_refused_with_what_would_do():
    with pytest.raises(ConfigError, match=r"--concurrent 3: runs of 4 workers each, .* 8 GPUs; at most 2 fit"):
        share_out({"CPU": 64, "GPU": 8}, ClusterConfig(workers=4), 9, concurrent=3)
    with pytest.raises(ConfigError, match=r"--concurrent 0"):
        share_out({"CPU": 8}, ClusterConfig(), 9, concurrent=0)
