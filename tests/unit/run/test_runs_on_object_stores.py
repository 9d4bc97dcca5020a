"""Whole runs whose folder is on S3 and on Google Cloud Storage, as servers on this machine speak them."""

import html
import itertools
import time

import pytest
import torch
from fakes import Silent
from fault_proxy import SLOW_DOWN
from helpers import write_pictures
from whole_runs import on_pictures, power_cut

from laasp_ray import load_pruned, models, prune
from laasp_ray.store.journal import Journal
from laasp_ray.store.storage import Storage


@pytest.fixture
def anew(object_store, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield
    object_store.proxy.set(None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images"), side=8, train=12, test=6)


@pytest.fixture(scope="module")
def on_disk(pictures, tmp_path_factory):
    """The events' names and the weights of a run on a local folder."""
    config = on_pictures(tmp_path_factory.mktemp("runs"), pictures)
    weights = run(config).model.state_dict()
    return names_of(config), weights


def run(config):
    return prune(config, distributed=False, progress=Silent())


def names_of(config):
    return [event.name for event in Journal(Storage.open(str(config.storage)).child(config.name)).events()]


def on(object_store, name, pictures):
    return on_pictures(object_store.uri(name), pictures)


def check(config, on_disk):
    names, weights = on_disk
    assert names_of(config) == names
    loaded = load_pruned(Storage.open(str(config.storage)).child(config.name), models.build(config.model))
    found = loaded.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights.items())


def test_a_run_cut_off_there_ends_as_on_a_local_folder(object_store, anew, pages, pictures, on_disk, monkeypatch):
    config = on(object_store, "cut", pictures)
    for events in (1, 3):
        with power_cut(monkeypatch, events):
            run(config)
    run(config)
    check(config, on_disk)
    folder = Storage.open(str(config.storage)).child(config.name)
    page = html.unescape(folder.read("report.html").decode())
    assert f"laasp_ray run in {folder.uri}" in page
    assert ">finished<" in page


def test_a_store_that_fails_now_and_then_and_is_gone_for_seconds_changes_nothing(object_store, anew, pictures, on_disk):
    config = on(object_store, "faulty", pictures)
    began, writes = time.monotonic(), itertools.count(1)

    def policy(method, path, number):
        write = next(writes) if method in ("PUT", "POST") else 0
        if write and write % 4 == 0:
            return ("lost", "reset", SLOW_DOWN)[write // 4 % 3]
        return "reset" if 1 < time.monotonic() - began < 2.5 else None

    object_store.proxy.set(policy)
    run(config)
    assert object_store.proxy.broken > 5
    object_store.proxy.set(None)
    check(config, on_disk)
