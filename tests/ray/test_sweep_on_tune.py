"""A small sweep under Ray Tune."""

import dataclasses

import pytest
import torch
from helpers import write_pictures
from whole_runs import on_pictures

from laasp_ray import load_pruned, models
from laasp_ray.sweep.goals import Targets
from laasp_ray.sweep.run import run_sweep

pytestmark = [pytest.mark.ray, pytest.mark.exhaustive, pytest.mark.timeout(600)]


def test_trials_on_tune_are_those_of_one_process(tmp_path, monkeypatch):
    """One worker a run, two runs at a time, one thread each, against one process with one thread."""
    pictures = write_pictures(tmp_path / "images", side=8, train=12, test=6)
    goal, lines = Targets((0.06, 0.12)), []
    results = {}
    for name, distributed in (("tune", True), ("here", False)):
        config = dataclasses.replace(on_pictures(tmp_path, pictures, cluster__workers=1), name=name)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            results[name] = run_sweep(config, goal, distributed=distributed, say=lines.append)
        finally:
            torch.set_num_threads(threads)
    assert all(row.is_finished for row in results["tune"].rows)
    for ours, theirs in zip(results["tune"].rows, results["here"].rows, strict=True):
        assert (ours.name, ours.flops_reduction, ours.top1_after) == (
            theirs.name,
            theirs.flops_reduction,
            theirs.top1_after,
        )
        networks = [load_pruned(row.folder, models.build(config.model)).state_dict() for row in (ours, theirs)]
        assert all(torch.equal(tensor, networks[1][key]) for key, tensor in networks[0].items()), ours.name
    assert any("flops-0.06 ends: top-1" in line for line in lines)
