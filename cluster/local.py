"""A Ray cluster of several nodes on this machine: `python cluster/local.py up --nodes 2`, later `down`.

Every node is a `ray start --block` process of its own, in its own session, with its own CPUs, ports and folder. The
cluster has its own token; its dashboard listens on loopback; it has no Ray Client port. `down` ends the processes of
these sessions and no others: it never runs `ray stop`, which would end every Ray of this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

DEFAULT_PORT = 26379
PORTS_A_NODE = 200
"""A node's block of ports: its own processes take the first ten, its workers those from the twentieth on."""
HEAD_PORTS = ("port", "dashboard-port")
NODE_PORTS = (
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
HEAD_METRICS_FROM, HEAD_METRICS = 8, ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")
"""Ports of the head that no flag sets, by the variables that do. Without them they are 44217 and 44227."""
WORKER_PORTS_FROM = 20
RAY_WITHOUT_CLIENT_PORT = (
    "from ray.scripts import scripts; scripts.get_ray_client_dependency_error = lambda: 'not wanted'; scripts.main()"
)
"""The command `ray`, which otherwise opens port 10001 for Ray Client where grpcio is installed: TensorBoard has it."""
START_SECONDS = 120
STOP_SECONDS = 40
LEAST_OBJECT_STORE = 100 * 2**20
LONGEST_FOLDER = 34
"""Characters. Ray puts sockets below the folder, and a socket's path has at most 107."""


class ClusterError(Exception):
    """What the user is told: what is wrong, where, and what to do."""


def default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"laasp_ray-{os.getuid()}"


def ports_of(node: int, first: int) -> dict[str, int]:
    """The ports of a node by the name of their flag; node 0 is the head."""
    base = first + node * PORTS_A_NODE
    names = (*HEAD_PORTS, *NODE_PORTS) if node == 0 else NODE_PORTS
    ports = {name: base + number for number, name in enumerate(names)}
    return {**ports, "min-worker-port": base + WORKER_PORTS_FROM, "max-worker-port": base + PORTS_A_NODE - 1}


def metrics_ports(first: int) -> dict[str, int]:
    """The head's further ports by their variable."""
    return {variable: first + HEAD_METRICS_FROM + number for number, variable in enumerate(HEAD_METRICS)}


def check_ports(nodes: int, first: int) -> None:
    """Raises ClusterError where a port that a node listens on is taken, or there is none of that number."""
    last = first + nodes * PORTS_A_NODE - 1
    if not 1024 <= first <= last <= 65535:
        raise ClusterError(
            f"{nodes} nodes need the ports {first} to {last}, which are not all within 1024 to 65535: "
            "give another --port or fewer --nodes"
        )
    fixed = [port for node in range(nodes) for name, port in ports_of(node, first).items() if "worker" not in name]
    taken = [port for port in (*fixed, *metrics_ports(first).values()) if not _is_free(port)]
    if taken:
        raise ClusterError(
            f"taken already on this machine: port {', '.join(map(str, taken))}. Give another --port "
            f"(the cluster uses {nodes * PORTS_A_NODE} from it on)"
        )


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that is only just closed is free
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def object_store_bytes(nodes: int) -> int:
    """A node's part of what Ray gives the object store of a machine: 30% of the memory, if /dev/shm holds it."""
    room = psutil.virtual_memory().total * 0.3
    with contextlib.suppress(OSError):
        room = min(room, shutil.disk_usage("/dev/shm").free * 0.9)
    return max(LEAST_OBJECT_STORE, int(room / nodes))


def command_of(node: int, options: argparse.Namespace) -> list[str]:
    """The `ray start` of a node."""
    role = ["--head", "--dashboard-host=127.0.0.1"] if node == 0 else [f"--address=127.0.0.1:{options.port}"]
    return [
        sys.executable,
        "-c",
        RAY_WITHOUT_CLIENT_PORT,
        "start",
        *role,
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--temp-dir={options.folder / f'node{node}'}",
        *(f"--{name}={port}" for name, port in ports_of(node, options.port).items()),
        f"--num-cpus={options.cpus_per_node}",
        f"--num-gpus={options.gpus_per_node}",
        f"--object-store-memory={object_store_bytes(options.nodes)}",
        "--disable-usage-stats",
    ]


def environment_of(node: int, options: argparse.Namespace) -> dict[str, str]:
    """What a node's processes see; nothing of another Ray cluster that this shell may know."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(options.folder / "token"),
        "RAY_TMPDIR": str(options.folder / f"node{node}"),
        # So that the `python` of a submitted job is the one that has this project.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)]),
    }
    if node == 0:
        own |= {variable: str(port) for variable, port in metrics_ports(options.port).items()}
    if options.gpus_per_node:
        first = node * options.gpus_per_node
        own["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, first + options.gpus_per_node)))
    return {**kept, **own}


def processes_of(node: dict[str, float]) -> list[psutil.Process]:
    """What lives of a node: the processes of its session, and whatever these have started in sessions of their own.

    A session's number is not given to another process while any process of it lives. If its first process lives but
    was started at another time, the number was given anew after all of ours had ended.
    """
    pid = int(node["pid"])
    with contextlib.suppress(psutil.NoSuchProcess):
        if abs(psutil.Process(pid).create_time() - node["started"]) > 1:
            return []
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == pid:
                found[process.pid] = process
                found.update((child.pid, child) for child in process.children(recursive=True))
    return [process for process in found.values() if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def end(node: dict[str, float]) -> None:
    """Ends a node: its `ray start` is asked to end all that it started; what is left after a while is killed."""
    mine = processes_of(node)
    for process in mine:
        if process.pid == node["pid"]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
            psutil.wait_procs([process], timeout=STOP_SECONDS)
    left = {process.pid: process for process in (*mine, *processes_of(node)) if _lives(process)}
    _, left_after_a_moment = psutil.wait_procs(list(left.values()), timeout=3)
    for process in left_after_a_moment:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left_after_a_moment, timeout=10)


def read_nodes(folder: Path) -> list[dict[str, float]] | None:
    """The nodes that `up` noted; None where there is no cluster. Raises ClusterError for a folder of another user."""
    try:
        if folder.lstat().st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
            raise ClusterError(f"{folder} is not a folder of yours: give another --folder")
        return json.loads((folder / "cluster.json").read_text())["nodes"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise ClusterError(
            f"{folder / 'cluster.json'} cannot be read ({error!r}), so nothing is known of the processes of the "
            f"cluster there: look for them with `pgrep -fa {folder}`, end them, and remove {folder}"
        ) from error


def write_nodes(folder: Path, nodes: list[dict[str, float]]) -> None:
    new = folder / "cluster.json.new"
    new.write_text(json.dumps({"nodes": nodes}))
    new.replace(folder / "cluster.json")


def remove(folder: Path) -> None:
    """Removes what `up` made there; the folder too, if nothing else is in it."""
    for path in (*folder.glob("node*"), folder / "token", *folder.glob("cluster.json*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def ask_dashboard(path: str, options: argparse.Namespace) -> dict:
    """The head's answer; raises OSError (which URLError is) or ValueError where it has none yet."""
    token = (options.folder / "token").read_text()
    address = f"http://127.0.0.1:{ports_of(0, options.port)['dashboard-port']}{path}"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
    no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with no_proxy.open(request, timeout=5) as answer:
        return json.load(answer)


def nodes_alive(options: argparse.Namespace) -> int:
    try:
        found = ask_dashboard("/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE", options)
        return int(found["data"]["result"]["total"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def start(node: int, options: argparse.Namespace) -> tuple[subprocess.Popen, dict[str, float]]:
    (options.folder / f"node{node}").mkdir()
    with (options.folder / f"node{node}.log").open("w") as log:
        process = subprocess.Popen(
            command_of(node, options),
            env=environment_of(node, options),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}


def wait_for(node: int, process: subprocess.Popen, options: argparse.Namespace) -> None:
    """Waits until the head counts node + 1 nodes. Raises ClusterError with the end of the node's log."""
    deadline = time.monotonic() + START_SECONDS
    while nodes_alive(options) < node + 1:
        if process.poll() is not None or time.monotonic() > deadline:
            why = "ended" if process.poll() is not None else f"did not join within {START_SECONDS} s"
            log = (options.folder / f"node{node}.log").read_text(errors="replace").strip().splitlines()
            raise ClusterError("\n".join([f"node {node} {why}; the end of its log:", *log[-15:]]))
        time.sleep(0.5)


def up(options: argparse.Namespace) -> None:
    os.umask(0o077)
    folder = options.folder
    if len(str(folder)) > LONGEST_FOLDER:
        raise ClusterError(
            f"--folder {folder} has {len(str(folder))} characters: for Ray's sockets it may have {LONGEST_FOLDER}"
        )
    known = read_nodes(folder)
    if known is not None:
        if any(processes_of(node) for node in known):
            raise ClusterError(
                f"a cluster of {len(known)} nodes runs already in {folder}: take it down with "
                f"`{_this_script('down', folder)}`, or give another --folder and --port"
            )
        print(f"# the cluster in {folder} had ended without `down`: its files are removed", file=sys.stderr)
        remove(folder)
    check_ports(options.nodes, options.port)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ClusterError(f"{folder} is not empty: give a --folder that is, or that is not there yet")
    folder.chmod(0o700)
    (folder / "token").write_text(secrets.token_hex(32))
    nodes: list[dict[str, float]] = []
    try:
        for number in range(options.nodes):
            process, node = start(number, options)
            nodes.append(node)
            write_nodes(folder, nodes)
            wait_for(number, process, options)
            line = f"# node {number} is up: pid {process.pid}, {options.cpus_per_node} CPUs"
            print(line, file=sys.stderr, flush=True)
    except BaseException:  # Ctrl-C too: no half a cluster stays behind
        for node in reversed(nodes):
            end(node)
        remove(folder)
        raise
    print("\n".join(lines_to_use(options)))


def lines_to_use(options: argparse.Namespace) -> Iterator[str]:
    """What to give a shell, then, as comments, what to run there."""
    yield f"export RAY_ADDRESS=127.0.0.1:{options.port}"
    yield f"export RAY_AUTH_TOKEN_PATH={shlex.quote(str(options.folder / 'token'))}"
    yield "export RAY_AUTH_MODE=token"
    yield "# in a shell that has these three lines, from the root of the project:"
    yield f"#   ray job submit --working-dir . -- python jobs/prune_resnet50.py --storage {Path.home() / 'runs'}"
    yield f"# the dashboard, which asks for the token: http://127.0.0.1:{ports_of(0, options.port)['dashboard-port']}"
    yield f"# the end: {_this_script('down', options.folder)}"


def _this_script(action: str, folder: Path) -> str:
    more = "" if folder == default_folder() else f" --folder {shlex.quote(str(folder))}"
    return f"python cluster/local.py {action}{more}"


def down(options: argparse.Namespace) -> None:
    nodes = read_nodes(options.folder)
    if nodes is None:
        raise ClusterError(f"there is no cluster in {options.folder}: nothing to take down")
    for number, node in reversed(list(enumerate(nodes))):  # the head last, so that no node looks for it in vain
        had = len(processes_of(node))
        end(node)
        left = processes_of(node)
        if left:
            raise ClusterError(f"node {number}: process {', '.join(str(one.pid) for one in left)} cannot be ended")
        print(f"node {number} is down: {had} processes ended" if had else f"node {number} had ended already")
    remove(options.folder)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (("up", "starts the cluster and prints what a shell needs to use it"), ("down", "ends it")):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--folder", type=Path, default=default_folder(), help="where it lives (%(default)s)")
        if name == "up":
            action.add_argument("--nodes", type=positive, required=True, help="how many, the head among them")
            action.add_argument("--cpus-per-node", type=positive, help="by default this machine's CPUs / nodes")
            action.add_argument("--gpus-per-node", type=int, default=0, help="GPUs of its own (%(default)s)")
            action.add_argument("--port", type=int, default=DEFAULT_PORT, help="the first port (%(default)s)")
    options = parser.parse_args(arguments)
    options.folder = options.folder.expanduser().absolute()
    if options.action == "up" and options.cpus_per_node is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options.cpus_per_node = max(1, cpus // options.nodes)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        (up if options.action == "up" else down)(options)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: stopped; nothing is left of the cluster", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
