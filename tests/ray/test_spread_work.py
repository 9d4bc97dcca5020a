"""Shards made by Ray tasks, and what becomes of a piece of work whose worker is killed."""

import pytest
from own_tasks import Failing, Killed

from laasp_ray.cli.prepare_data import prepare_data
from laasp_ray.distributed.spread import RETRIES, LostWorkError, spread_over
from laasp_ray.errors import DataError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session")]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_shards_made_on_ray_are_those_of_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAASP_RAY_CACHE", str(tmp_path / "cache"))
    one, many = tmp_path / "one", tmp_path / "many"
    assert prepare_data(["--out", str(one), "--samples", "200", "--no-ray"]) == 0
    assert prepare_data(["--out", str(many), "--samples", "200"]) == 0
    assert contents(one) == contents(many) and len(contents(one)) == 14  # 8 and 2 shards, two lists of each split
    assert prepare_data([str(many), "--verify"]) == 0
    assert "val: 2 shards, 355 samples, 2 are as listed" in capsys.readouterr().out


def test_a_piece_whose_worker_is_killed_begins_again(tmp_path):
    steps = list(spread_over(2)([Killed(tmp_path, 2)]))
    assert steps[-1] == "done" and len(list(tmp_path.iterdir())) == 2
    assert sum(step for step in steps if isinstance(step, int)) == 10


def test_a_piece_whose_workers_are_all_killed_ends_the_work(tmp_path):
    with pytest.raises(LostWorkError, match=r"begun 4 times, and its worker was lost each time: .*see to the memory"):
        list(spread_over(2)([Killed(tmp_path, RETRIES + 1)]))


def test_what_a_piece_raises_is_raised_here(tmp_path):
    with pytest.raises(DataError, match=r"^the storage is gone$"):
        list(spread_over(2)([Failing("the storage is gone"), *(Killed(tmp_path, 0) for _ in range(8))]))
