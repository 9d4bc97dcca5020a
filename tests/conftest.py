import random
import sys

import numpy as np
import pytest
import torch
from object_stores import ServerMissingError, google_store, s3_store

from laasp_ray.report.page.writer import PageWriter

_write_page = PageWriter._write


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests run in parallel with one process per core, so more than one thread per process would only slow them
    down.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def no_pages_unasked():
    """Runs write no report.html, which takes a second of each, but in tests that ask for `pages`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PageWriter, "_write", lambda writer: None)
        yield


@pytest.fixture
def pages(monkeypatch):
    """Runs write report.html, as they do outside of tests."""
    monkeypatch.setattr(PageWriter, "_write", _write_page)


@pytest.fixture(autouse=True)
def random_state():
    """Begins every test in the same random state, whichever test ran before it in this process. It is none that a
    test sets itself.
    """
    random.seed(2147)
    np.random.seed(2147)
    torch.manual_seed(2147)


@pytest.fixture(autouse=True)
def no_ray_unasked(request):
    """Fails a test that is not marked `ray` but leaves a Ray session: some calls of Ray start one by themselves."""
    yield
    ray = sys.modules.get("ray")
    if request.node.get_closest_marker("ray") is None and ray is not None and ray.is_initialized():
        ray.shutdown()
        pytest.fail("this test started Ray and is not marked so")


@pytest.fixture(scope="session", params=["s3", "gs"])
def object_store(request, tmp_path_factory):
    """A server that speaks S3, then one that speaks Google's protocol."""
    try:
        with s3_store(tmp_path_factory.mktemp("weed")) if request.param == "s3" else google_store() as store:
            yield store
    except ServerMissingError as error:
        pytest.skip(str(error))
