import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests run side by side, one process a core; more threads than that only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
