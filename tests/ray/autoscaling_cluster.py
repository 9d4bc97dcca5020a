"""A cluster of Ray's own autoscaler, whose nodes are processes of this machine (Ray's provider for tests of it).

`ray.cluster_utils.AutoscalingCluster` is not used: it runs `ray stop --force`, which ends every Ray of the machine.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

PORT = 28779
START_S = 60
START = [
    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={PORT}", "--num-cpus=0"),
    *("--object-store-memory=100000000", "--disable-usage-stats", "--include-dashboard=False"),
]


@contextlib.contextmanager
def autoscaling_cluster(most: int, *, second: bool) -> Iterator[dict[str, str]]:
    """A head without CPUs, and at most `most` nodes of one CPU each. Gives the environment of a driver.

    `second`: with Ray's second autoscaler, which `ray up` and KubeRay use, or else with the first.
    """
    with tempfile.TemporaryDirectory(prefix="as", dir="/tmp", ignore_cleanup_errors=True) as folder:
        address = f"{get_node_ip_address()}:{PORT}"
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        shared = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
        config = Path(folder, "autoscaler.json")
        config.write_text(json.dumps(_config(most, address)))
        with Path(folder, "head.log").open("wb") as log:
            head = subprocess.Popen(
                [*START, f"--temp-dir={folder}", f"--autoscaling-config={config}"],
                env=kept | shared | _head_environment(second) | {"RAY_TMPDIR": folder},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            _wait_for(head, Path(folder, "head.log"))
            yield kept | shared | {"RAY_ADDRESS": address}
        finally:
            _end(head, folder)


def _config(most: int, address: str) -> dict[str, object]:
    provider = {
        "type": "external",
        "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
        "gcs_address": address,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    small = {"CPU": 1, "object_store_memory": 100_000_000}
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
    lists += ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    return {
        "cluster_name": "test",
        "max_workers": most,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.1,
        "auth": {"ssh_user": "nobody"},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "provider": provider,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": {"resources": small, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
        **{name: [] for name in lists},
    }


def _head_environment(second: bool) -> dict[str, str]:
    environment = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    if second:
        identity = {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
        environment |= {"RAY_enable_autoscaler_v2": "1", **identity}
    return environment


def _wait_for(head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text(errors="replace"):
        assert head.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.2)
    with socket.create_connection((get_node_ip_address(), PORT), timeout=10):
        pass


def _end(head: subprocess.Popen[bytes], folder: str) -> None:
    """Ends the head and what it started; the nodes' processes are known by the folder in their command lines."""
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(30)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if folder in " ".join(process.cmdline()):
                process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, 9)
    head.wait()
