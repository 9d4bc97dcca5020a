"""What a sweep's numbers depend on stays as it began."""

import json

import pytest
import torch

from laasp_ray.config import ClusterConfig
from laasp_ray.errors import ConfigError
from laasp_ray.sweep.arithmetic import Arithmetic

BEGUN = Arithmetic(ray=True, workers=2, threads=3, driver_threads=1)


def test_what_is_left_open_is_as_the_sweep_began():
    stored = Arithmetic.from_json(json.loads(json.dumps(BEGUN.to_json())))
    assert stored == BEGUN
    kept = stored.kept_by(ClusterConfig(search_workers=5), "s", ray=True)
    assert (kept.workers, kept.threads, kept.search_workers) == (2, 3, 5)
    assert stored.kept_by(ClusterConfig(workers=2, threads=3), "s", ray=True) == ClusterConfig(workers=2, threads=3)


@pytest.mark.parametrize(
    ("cluster", "ray", "message"),
    [
        (ClusterConfig(workers=1), True, r"cluster\.workers \(--workers\): 2 there, 1 here, which changes its numbers"),
        (ClusterConfig(threads=1), True, r"cluster\.threads: 3 there, 1 here"),
        (ClusterConfig(workers=1, threads=1), True, r"2 there, 1 here; cluster\.threads: 3 there, 1 here"),
        (ClusterConfig(), False, r"--no-ray: not given there, given here"),
    ],
)
def test_other_values_are_refused_with_their_keys(cluster, ray, message):
    with pytest.raises(ConfigError, match=message):
        BEGUN.kept_by(cluster, "s", ray=ray)


def test_threads_of_trainers_are_nothing_on_gpus():
    begun = Arithmetic.of(ClusterConfig(workers=2, threads=3), gpus=True)
    assert begun.threads == 0
    assert begun.kept_by(ClusterConfig(threads=7), "s", ray=True).threads == 0


def test_a_driver_has_the_threads_that_it_began_with():
    before = torch.get_num_threads()
    begun = Arithmetic(ray=False, workers=1, threads=1, driver_threads=before + 1)
    with begun.of_driver():
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
