"""Credentials in an address are never shown or stored."""

import dataclasses
import json

import pytest
from fakes import Silent
from helpers import write_pictures
from whole_runs import on_pictures

from laasp_ray import prune
from laasp_ray.cli import stopping
from laasp_ray.errors import ConfigError, StoreError
from laasp_ray.store.addresses import public, public_data, public_text
from laasp_ray.store.storage import Storage


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://KEY:SECRET@bucket/runs", "s3://bucket/runs"),
        ("s3://KEY:SEC%2FRET@bucket/runs?region=eu&scheme=http", "s3://bucket/runs?region=eu&scheme=http"),
        ("s3://KEY:SEC/RET@bucket/runs", "s3://bucket/runs"),
        ("s3://KEY@bucket/runs", "s3://bucket/runs"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("s3://bucket/a:1@b", "s3://bucket/a:1@b"),
        ("hdfs://host:8020/a@b", "hdfs://host:8020/a@b"),
        ("abfs://name:KEY@host/x?client_secret=abc&tenant_id=t&sig=q", "abfs://host/x?tenant_id=t"),
        ("s3://bucket/x?secret_key=abc", "s3://bucket/x"),
        ("/data/a:b@c", "/data/a:b@c"),
        ("torchvision:IMAGENET1K_V2", "torchvision:IMAGENET1K_V2"),
    ],
)
def test_an_address_is_shown_without_credentials(address, shown):
    assert public(address) == shown


def test_text_and_data_are_shown_without_credentials():
    address = "s3://KEYID:SEC%2FRET@bucket/runs"
    assert public_text(f"cannot parse '{address}&x=true' (KEYID, SEC/RET)", address) == (
        "cannot parse 's3://bucket/runs&x=true' (***, ***)"
    )
    assert public_text("see s3://A:B@c/d: broken") == "see s3://c/d: broken"
    data = {"storage": address, "sparsity": {"from_run": address}, "list": [address, 1, None]}
    assert public_data(data) == {
        "storage": "s3://bucket/runs",
        "sparsity": {"from_run": "s3://bucket/runs"},
        "list": ["s3://bucket/runs", 1, None],
    }


OPTIONS = "region=us-east-1&endpoint_override=localhost:1&scheme=http"


def test_a_store_knows_its_credentials_and_does_not_say_them():
    storage = Storage.open(f"s3://KEYID:SECRET@bucket/runs?{OPTIONS}").child("one")
    assert storage.uri == f"s3://bucket/runs/one?{OPTIONS}" and "SECRET" not in repr(storage)
    other = Storage.open(f"s3://bucket/runs?{OPTIONS}").child("one")
    assert storage._folder._filesystem != other._folder._filesystem  # the credentials did reach pyarrow


@pytest.mark.parametrize("address", ["s4://KEYID:SECRET@bucket/run", "s3://KEYID:SEC/RET@bucket/run?nonsense=1"])
def test_a_store_that_cannot_be_opened_does_not_say_its_credentials(address):
    with pytest.raises(StoreError, match=r"cannot open the storage s[34]://bucket/run") as caught:
        Storage.open(address)
    assert "KEYID" not in str(caught.value) and "RET" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_a_run_stores_no_credentials(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    from pyarrow.fs import FileSystem, SubTreeFileSystem

    pictures, tmp_path = write_pictures(tmp_path / "images", side=8, train=12, test=6), tmp_path / "store"
    tmp_path.mkdir()
    local, _ = FileSystem.from_uri(f"file://{tmp_path}")
    kept = SubTreeFileSystem(str(tmp_path), local)
    monkeypatch.setattr("laasp_ray.store.storage._from_uri", lambda kind, uri: (kept, "bucket/runs"))
    address = "s3://KEYID:SECRET@bucket/runs"
    config = dataclasses.replace(on_pictures(tmp_path, pictures), storage=address)
    result = prune(config, distributed=False, progress=Silent())
    assert result.folder == f"s3://bucket/runs/{config.name}"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if b"SECRET" in path.read_bytes() or b"KEYID" in path.read_bytes()]
    assert json.loads((tmp_path / "bucket/runs" / config.name / "config.json").read_text())["storage"] == (
        "s3://bucket/runs"
    )
    assert prune(config, distributed=False).summary == result.summary  # finished: loaded, by the same address


def test_the_commands_print_no_credentials(capsys):
    def fail():
        raise ConfigError("the run in s3://KEYID:SECRET@bucket/runs is no run")

    assert stopping.guarded(fail) == 2
    assert capsys.readouterr().err == "error: the run in s3://bucket/runs is no run\n"
