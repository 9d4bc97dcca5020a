import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests run in parallel with one process per core, so more than one thread per process would only slow them
    down.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
