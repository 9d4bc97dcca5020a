"""Quick checks of the address of a Ray cluster; Ray itself would wait for minutes or crash.

The checks do not import Ray, so they can be made before anything that takes long.
"""

from __future__ import annotations

import os
import socket
import sys
from urllib.parse import urlsplit

from laasp_ray.errors import ConfigError

WAIT_S = 5.0
"""The seconds that a cluster may take to answer."""
_LONGEST_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
"""The longest path of a socket that the operating system allows, in bytes."""
_CLIENT_PORT = 10001


def check_address(address: str | None, wait_s: float = WAIT_S) -> str:
    """The address for Ray, from `address`, RAY_ADDRESS or neither ('local': a cluster that is started here).

    Raises ConfigError if no cluster answers there within `wait_s` seconds, or if none can be started here.
    """
    ray = sys.modules.get("ray")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if ray is not None and ray.is_initialized():
        return address  # the caller's session is used
    if address == "local":
        check_socket_path()
    elif address != "auto":
        _check_reachable(address, wait_s)
    return address


def check_socket_path() -> None:
    """Raises ConfigError if the path of the temporary folder is too long for the sockets that Ray creates in it."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    if variable is None or os.name == "nt":
        return
    folder = os.environ[variable]
    below = f"/ray/session_2000-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    room = _LONGEST_SOCKET_PATH - len(below)
    if len(os.fsencode(folder)) > room:
        raise ConfigError(
            f"{variable} is {folder}, {len(os.fsencode(folder))} bytes long: with it the paths of Ray's sockets exceed "
            f"{_LONGEST_SOCKET_PATH} bytes; set RAY_TMPDIR to a folder with a path of at most {room}, such as /tmp"
        )


def _check_reachable(address: str, wait_s: float) -> None:
    is_client = address.startswith("ray://")
    host, port = _host_and_port(address)
    remedy = "check --ray-address or RAY_ADDRESS, and that the cluster runs (ray status there)"
    try:
        with socket.create_connection((host, port), timeout=wait_s):
            pass
    except OSError as error:
        reason = f"no answer in {wait_s:g} s" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise ConfigError(f"no Ray cluster could be reached at {address!r}: {reason}; {remedy}") from error
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true") and not _speaks_grpc(host, port, wait_s):
        kind = "Ray Client server" if is_client else "head of a Ray cluster"
        raise ConfigError(f"what listens at {address!r} is no {kind}: it does not answer as one; {remedy}")


def _host_and_port(address: str) -> tuple[str, int]:
    scheme, mark, rest = address.rpartition("://")
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if mark and scheme == "ray" and port is None:
        port = _CLIENT_PORT
    if not host or port is None or (mark and scheme != "ray"):
        raise ConfigError(
            f"the Ray address {address!r} must read HOST:PORT, such as 10.0.0.1:6379, or ray://HOST:PORT, or auto"
        )
    return host, port


def _speaks_grpc(host: str, port: int, wait_s: float) -> bool:
    """Whether a gRPC connection can be made. True if gRPC is not installed."""
    try:
        import grpc
    except ImportError:
        return True
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=wait_s)
        except grpc.FutureTimeoutError:
            return False
    return True
