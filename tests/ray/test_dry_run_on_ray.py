"""A dry run that measures on the cluster's workers."""

import pytest
from helpers import small_run

from laasp_ray.planning.dry_run import dry_run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_a_dry_run_measures_on_the_workers(session, tmp_path):
    text = dry_run(small_run(tmp_path / "runs"))
    assert "2, each" in text and "images read by dali-cpu" in text
    assert "one of 2 evaluation tasks" in text
    assert not (tmp_path / "runs").exists()
