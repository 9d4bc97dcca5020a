"""The files for `ray up`: Ray's own check, the keys that it lets pass whatever they are, and what makes them safe."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from laasp_ray import __version__

FOLDER = Path(__file__).resolve().parents[3] / "cluster" / "ray_up"
FILES = ("aws.yaml", "gcp.yaml")
by_file = pytest.mark.parametrize("file", FILES)

ALLOWED = {
    "aws.yaml": {
        "provider": {"type", "region", "availability_zone", "cache_stopped_nodes"},
        "node_config": {
            "InstanceType",
            "ImageId",
            "SecurityGroupIds",
            "SubnetIds",
            "KeyName",
            "IamInstanceProfile",
            "BlockDeviceMappings",
            "InstanceMarketOptions",
        },
    },
    "gcp.yaml": {
        "provider": {"type", "region", "availability_zone", "project_id"},
        "node_config": {
            "machineType",
            "disks",
            "guestAccelerators",
            "scheduling",
            "serviceAccounts",
            "metadata",
            "networkInterfaces",
            "tags",
        },
    },
}
"""Keys of the clouds' own, which Ray hands on unread: a misspelt one would be told by the cloud, or by nobody."""


def config_of(file):
    return yaml.safe_load((FOLDER / file).read_text())


def check(config):
    validate_config(prepare_config(copy.deepcopy(config)))


def unknown_keys(file, config):
    found = set(config["provider"]) - ALLOWED[file]["provider"]
    for node in config["available_node_types"].values():
        found |= set(node["node_config"]) - ALLOWED[file]["node_config"]
    return found


@by_file
def test_ray_accepts_it(file):
    check(config_of(file))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(idle_timeout=10),
        lambda config: config["docker"].update(run_option=[]),
        lambda config: config.update(head_node_type="haed"),
        lambda config: config["available_node_types"]["gpu"].update(min_worker=1),
    ],
)
@by_file
def test_ray_refuses_what_is_wrong(file, change):
    config = config_of(file)
    change(config)
    with pytest.raises(Exception, match=r"idle_timeout|run_option|head_node_type|min_worker"):
        check(config)


@by_file
def test_keys_of_the_cloud_are_known(file):
    config = config_of(file)
    assert unknown_keys(file, config) == set()
    config["available_node_types"]["gpu"]["node_config"]["InstanceTyp"] = "g6e.12xlarge"
    config["provider"]["regoin"] = "us-west-2"
    assert unknown_keys(file, config) == {"InstanceTyp", "regoin"}


@by_file
def test_ray_starts_with_a_token_and_its_dashboard_on_loopback(file):
    config = config_of(file)
    head, worker = (
        [command for command in config[f"{role}_start_ray_commands"] if "ray start" in command]
        for role in ("head", "worker")
    )
    assert all("RAY_AUTH_MODE=token ray start" in command for command in head + worker)
    assert re.findall(r"--dashboard-host=(\S+)", " ".join(head)) == ["127.0.0.1"]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


@by_file
def test_the_token_of_this_cluster_is_handed_to_the_container_s_user(file):
    config = config_of(file)
    mounted = f"/tmp/ray_tmp_mount/{config['cluster_name']}/home/ray/.ray/auth_token"
    assert f"sudo chown 1000:1000 {mounted}" in config["initialization_commands"]


@by_file
def test_nothing_is_installed_over_the_image(file):
    config = config_of(file)
    assert config["docker"]["image"] == f"registry.example/laasp_ray:{__version__}"
    prepared = prepare_config(copy.deepcopy(config))
    assert [prepared[f"{role}setup_commands"] for role in ("", "head_", "worker_")] == [[], [], []]


@by_file
def test_the_head_takes_no_tasks_and_there_is_a_worker_when_a_run_begins(file):
    types = config_of(file)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["min_workers"] >= 1
    assert types["gpu"]["max_workers"] <= config_of(file)["max_workers"]


@by_file
def test_every_blank_is_explained(file):
    blanks = set(re.findall(r"REPLACE_[A-Z_]+[A-Z]", (FOLDER / file).read_text()))
    readme = (FOLDER.parent / "README.md").read_text()
    assert blanks and {blank for blank in blanks if f"`{blank}`" not in readme} == set()
