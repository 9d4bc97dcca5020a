"""A cluster that is not there, or cannot be started, is told in seconds and before anything else."""

import os
import signal
import socket
import threading

import pytest

from laasp_ray.distributed import cluster
from laasp_ray.distributed.address import check_address
from laasp_ray.errors import ConfigError


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port():
    """A port of this machine where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_where_nobody_listens(port, monkeypatch):
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(ConfigError, match=rf"no Ray cluster.*{address}.*refused; check --ray-address"):
            check_address(address)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="refused"), cluster.connected():
        pass


def test_what_listens_is_no_cluster():
    missing = pytest.raises(ConfigError, match=r"no head of a Ray cluster: it does not answer")
    with socket.create_server(("127.0.0.1", 0)) as silent, missing:
        check_address(f"127.0.0.1:{silent.getsockname()[1]}", wait_s=0.3)


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "127.0.0.1:x", "http://127.0.0.1:80", ":6379", "a:99999"])
def test_an_address_of_another_form(address):
    with pytest.raises(ConfigError, match="must read HOST:PORT"):
        check_address(address)


def test_the_local_and_the_automatic_address_are_left_to_ray():
    assert check_address(None) == "local" and check_address("auto") == "auto"


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_whose_sockets_would_be_too_long(monkeypatch, variable):
    # 107 less '/ray/session_' (13), date and time (26), '_' and the process' number, '/sockets/plasma_store' (21).
    room = 107 - 13 - 26 - 1 - len(str(os.getpid())) - 21
    monkeypatch.setenv(variable, "/" + "x" * (room - 1))
    assert check_address(None) == "local"
    monkeypatch.setenv(variable, "/" + "x" * room)
    with pytest.raises(ConfigError, match=rf"{variable} is /x+, {room + 1} bytes long.*at most {room}, such as /tmp"):
        check_address(None)


def test_the_callers_handlers_of_signals_come_back():
    def ours(*_):
        pass

    before = signal.signal(signal.SIGTERM, ours)
    try:
        with cluster._callers_signals():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is ours
        elsewhere = threading.Thread(target=lambda: cluster._callers_signals().__enter__())
        elsewhere.start()
        elsewhere.join()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_cluster_that_does_not_start_in_time_is_an_error_of_one_sentence(monkeypatch):
    """On a machine with forty times the load that it can bear, Ray's own processes took more than a minute."""

    def init(**options):
        raise Exception("The current node timed out during startup.")  # as Ray raises it

    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(ConfigError, match=r"no Ray cluster could be reached at 'local': .*timed out during startup"):  # noqa: SIM117
        with cluster.connected("local"):
            pytest.fail("there is none")
