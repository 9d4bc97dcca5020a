"""`cluster/local.py` without Ray: which ports and environment a node gets, and what it refuses, in which words."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from local_script import local


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a path as short as Ray's sockets need, whatever pytest's own is."""
    monkeypatch.setattr(local, "LONGEST_FOLDER", 1000)
    before = os.umask(0o022)
    yield tmp_path / "cluster"
    os.umask(before)


@pytest.fixture
def sleeper():
    """A process in a session of its own, as a node's is, which has started another."""
    code = "import subprocess, sys, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not psutil.Process(process.pid).children():
        time.sleep(0.05)
    yield process, {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
    process.kill()
    process.wait()


def noted(folder, *nodes):
    folder.mkdir()
    local.write_nodes(folder, list(nodes))


def options_of(*arguments):
    return local.parse(list(arguments))


def test_no_two_nodes_share_a_port():
    nodes = [local.ports_of(node, 30000) for node in range(3)]
    fixed = [port for ports in nodes for name, port in ports.items() if "worker" not in name]
    fixed += local.metrics_ports(30000).values()
    ranges = [port for ports in nodes for port in range(ports["min-worker-port"], ports["max-worker-port"] + 1)]
    assert len({*fixed, *ranges}) == len(fixed) + len(ranges)
    assert nodes[0]["port"] == 30000 and "port" not in nodes[1]
    assert max(ranges) == 30599


def test_a_node_is_told_its_cpus_and_the_head_keeps_its_dashboard_on_loopback():
    options = options_of("up", "--nodes", "2", "--cpus-per-node", "3", "--port", "30000", "--folder", "/tmp/lr")
    head, worker = local.command_of(0, options), local.command_of(1, options)
    assert {"--head", "--block", "--dashboard-host=127.0.0.1", "--num-cpus=3", "--port=30000"} <= set(head)
    assert {"--address=127.0.0.1:30000", "--block", "--num-cpus=3", "--num-gpus=0"} <= set(worker)
    assert "--head" not in worker and not any("ray-client" in argument for argument in head + worker)


def test_cpus_are_shared_out_by_default():
    cpus = len(os.sched_getaffinity(0))
    assert options_of("up", "--nodes", "1").cpus_per_node == cpus
    assert options_of("up", "--nodes", str(4 * cpus)).cpus_per_node == 1


def test_a_node_sees_its_own_token_folder_and_gpus_and_nothing_of_another_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    options = options_of("up", "--nodes", "2", "--gpus-per-node", "2", "--folder", "/tmp/lr")
    environment = local.environment_of(1, options)
    assert {key: value for key, value in environment.items() if key.startswith("RAY_")} == {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": "/tmp/lr/token",
        "RAY_TMPDIR": "/tmp/lr/node1",
    }
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_what_is_printed_has_the_token_on_and_names_the_folder_that_is_not_the_usual_one():
    lines = list(local.lines_to_use(options_of("up", "--nodes", "1", "--folder", "/tmp/a b", "--port", "30000")))
    assert lines[:3] == [
        "export RAY_ADDRESS=127.0.0.1:30000",
        "export RAY_AUTH_TOKEN_PATH='/tmp/a b/token'",
        "export RAY_AUTH_MODE=token",
    ]
    assert all(line.startswith("#") for line in lines[3:])
    assert "ray job submit --working-dir . -- python jobs/prune_resnet50.py" in lines[4]
    assert lines[-1].endswith("down --folder '/tmp/a b'")


def test_a_port_that_is_taken_is_named(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 30002))
        taken.listen()
        assert local.main(["up", "--nodes", "1", "--port", "30000", "--folder", str(folder)]) == 1
    assert "taken already on this machine: port 30002. Give another --port" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize(("nodes", "port"), [("1", "80"), ("3", "65000")])
def test_ports_that_there_are_not_are_refused(folder, capsys, nodes, port):
    assert local.main(["up", "--nodes", nodes, "--port", port, "--folder", str(folder)]) == 1
    assert "which are not all within 1024 to 65535" in capsys.readouterr().err


def test_a_long_folder_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(local, "LONGEST_FOLDER", 5)
    assert local.main(["up", "--nodes", "1", "--folder", str(tmp_path / "cluster")]) == 1
    assert "for Ray's sockets it may have 5" in capsys.readouterr().err


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(folder, capsys):
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    assert local.main(["up", "--nodes", "1", "--port", "31000", "--folder", str(folder)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert (folder / "mine.txt").read_text() == "mine"


def test_nothing_to_take_down_is_said(folder, capsys):
    assert local.main(["down", "--folder", str(folder)]) == 1
    assert f"there is no cluster in {folder}: nothing to take down" in capsys.readouterr().err


def test_a_second_cluster_in_the_folder_is_refused(folder, sleeper, capsys):
    noted(folder, sleeper[1])
    assert local.main(["up", "--nodes", "1", "--folder", str(folder)]) == 1
    assert "a cluster of 1 nodes runs already" in capsys.readouterr().err
    assert sleeper[0].poll() is None


def test_down_ends_the_node_with_what_it_started_and_removes_only_its_own_files(folder, sleeper, capsys):
    process, node = sleeper
    child = psutil.Process(process.pid).children()[0]
    noted(folder, node)
    (folder / "node0").mkdir()
    (folder / "runs").mkdir()
    assert local.main(["down", "--folder", str(folder)]) == 0
    assert "node 0 is down: 2 processes ended" in capsys.readouterr().out
    assert not psutil.pid_exists(process.pid) and not psutil.pid_exists(child.pid)
    assert [path.name for path in folder.iterdir()] == ["runs"]


def test_a_process_that_got_the_number_of_one_of_ours_is_left_alone(folder, sleeper, capsys):
    process, node = sleeper
    noted(folder, {**node, "started": node["started"] - 1000})
    assert local.main(["down", "--folder", str(folder)]) == 0
    assert "node 0 had ended already" in capsys.readouterr().out
    assert process.poll() is None and not folder.exists()


def test_notes_that_cannot_be_read_are_not_guessed_at(folder, capsys):
    folder.mkdir()
    (folder / "cluster.json").write_text(json.dumps({"node": []}))
    assert local.main(["down", "--folder", str(folder)]) == 1
    assert "cannot be read (KeyError('nodes'))" in capsys.readouterr().err


def test_a_node_that_cannot_start_leaves_nothing_behind_and_its_log_is_shown(folder, monkeypatch, capsys):
    code = "print('no memory'); raise SystemExit(3)"
    monkeypatch.setattr(local, "command_of", lambda node, options: [sys.executable, "-c", code])
    monkeypatch.setattr(local, "check_ports", lambda nodes, first: None)
    assert local.main(["up", "--nodes", "2", "--port", "30000", "--folder", str(folder)]) == 1
    assert "node 0 ended; the end of its log:\nno memory" in capsys.readouterr().err
    assert not folder.exists()
