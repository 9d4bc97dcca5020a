import pytest
import ray


@pytest.fixture(scope="session")
def session():
    """One Ray session of two CPUs for all tests here, stopped by its own handle."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
