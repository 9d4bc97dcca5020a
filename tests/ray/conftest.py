import os
from pathlib import Path

import pytest
import ray

# Ray starts its workers with nice 15: beside the tests without Ray they would get next to nothing of two cores.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def session():
    """One Ray session of two CPUs for all tests here, stopped by its own handle."""
    with pytest.MonkeyPatch.context() as patch:  # workers import from the tests, as this process does
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
