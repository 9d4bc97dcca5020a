"""`cluster/local.py`: two nodes, reached with the token and not without, and nothing left of them afterwards."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from local_cluster import PORT, local_cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TELL_NODES = """
import json, ray
ray.init(log_to_driver=False)
print(json.dumps([[node["Alive"], node["Resources"]["CPU"], node["NodeManagerPort"]] for node in ray.nodes()]))
"""


def processes_with(text):
    """Those of this machine with the text in their command line, their environment as they began, or their folder."""
    found = []
    for process in psutil.process_iter():
        try:
            said = [*process.cmdline(), process.cwd(), *process.environ().values()]
        except (psutil.Error, OSError):
            continue
        if process.pid != os.getpid() and any(text in one for one in said):
            found.append(process)
    return found


def listening(processes):
    """Ports by the address that they are open on."""
    found = {}
    for process in processes:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.setdefault(connection.laddr.port, set()).add(connection.laddr.ip)
    return found


def status_of(address, token=None):
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_two_nodes_come_up_with_a_token_and_leave_nothing_behind():
    with local_cluster(nodes=2) as environment:
        assert environment["RAY_AUTH_MODE"] == "token"
        token = Path(environment["RAY_AUTH_TOKEN_PATH"])
        folder = token.parent
        assert [oct(path.stat().st_mode & 0o777) for path in (token, folder)] == ["0o600", "0o700"]

        done = subprocess.run(
            [sys.executable, "-c", TELL_NODES],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        nodes = json.loads(done.stdout.splitlines()[-1])
        assert [(alive, cpus) for alive, cpus, _ in nodes] == [(True, 1.0), (True, 1.0)]
        assert len({port for *_, port in nodes}) == 2

        dashboard = f"http://127.0.0.1:{PORT + 1}/api/version"
        assert [status_of(dashboard, said) for said in (None, "another", token.read_text())] == [401, 403, 200]

        ours = processes_with(str(folder))
        open_ports = listening(ours)
        assert open_ports[PORT + 1] == {"127.0.0.1"}  # the dashboard
        assert 10001 not in open_ports  # Ray Client
        assert {port for port in open_ports if not PORT <= port < PORT + 400} == set()
    left = processes_with(str(folder))
    assert [process.name() for process in left] == []
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ours)
