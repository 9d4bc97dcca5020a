"""The importance of filters and the statistics for scoring on Ray tasks, against the serial ones."""

import dataclasses
from contextlib import closing

import pytest
import ray
import torch
from helpers import randomise_batchnorm, small_run
from own_criteria import MeanActivation

from laasp_ray import models
from laasp_ray.criteria.pls import Pls
from laasp_ray.data.calibration import draw_calibration_images
from laasp_ray.data.loaders.decoding import normalise
from laasp_ray.data.sources.registry import open_source
from laasp_ray.distributed import search_workers
from laasp_ray.distributed.cluster import plan_resources
from laasp_ray.distributed.executor import RayExecutor
from laasp_ray.distributed.trainer import put_network
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.search.activations import ImportanceRequest
from laasp_ray.search.evaluate import CalibrationSet
from laasp_ray.search.executor import InProcessExecutor

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

WANTED = ImportanceRequest(("layer1.0.conv1", "layer2.1.conv1", "layer3.2.conv1"), "pls", Pls(2, "max"))


def setting(storage, **search):
    """The run's config, a network, and the images as they are drawn and as losses are measured on them."""
    config = small_run(storage, **{f"search__{key}": value for key, value in search.items()})
    torch.manual_seed(0)
    network = randomise_batchnorm(models.build(config.model)).eval()
    drawn = draw_calibration_images(open_source(config.data, "train"), config.data, images=config.search.images, seed=0)
    size = config.search.batch_size
    calibration = CalibrationSet(drawn.images, drawn.labels, size, lambda batch: normalise(batch, config.data))
    return config, network, drawn, calibration


def test_the_spread_importance_is_the_serial_one(session, tmp_path, request):
    config, network, drawn, calibration = setting(tmp_path, images=60, batch_size=10)
    share = plan_resources(ray.cluster_resources(), config.cluster)
    spread = RayExecutor(put_network(network), network, drawn, config, share)
    request.addfinalizer(spread.close)
    serial = InProcessExecutor(network, calibration, torch.device("cpu"), config.search, config.seed)
    state = capture(network, Plan.empty())
    for wanted in (WANTED, ImportanceRequest(WANTED.layers, "own_criteria:MeanActivation", MeanActivation())):
        found, expected = (one.importance(state, wanted) for one in (spread, serial))
        for layer in wanted.layers:
            torch.testing.assert_close(found[layer], expected[layer], rtol=0, atol=1e-6)
        again = spread.importance(state, wanted)
        assert all(torch.equal(found[layer], again[layer]) for layer in wanted.layers)


def test_how_many_tasks_run_at_a_time_changes_no_bit_of_the_importance(session, tmp_path, monkeypatch):
    config, network, drawn, _ = setting(tmp_path, images=110, batch_size=10)
    share = plan_resources(ray.cluster_resources(), config.cluster)
    memory, reference, state = ray.cluster_resources()["memory"], put_network(network), capture(network, Plan.empty())
    found = []
    # Of two tasks that want more than half of the memory each, one waits for the other.
    for slots, task in ((1, {"memory": int(0.6 * memory)}), (2, {})):
        monkeypatch.setattr(search_workers, "slots_of", lambda resources, share, slots=slots: slots)
        cut = dataclasses.replace(share, task_options={**share.task_options, **task})
        with closing(RayExecutor(reference, network, drawn, config, cut)) as executor:
            found.append(executor.importance(state, WANTED))
    alone, two = found
    assert all(torch.equal(alone[layer], two[layer]) for layer in WANTED.layers)
    assert all(values.std() > 0 for values in found[0].values())


def test_the_statistics_for_scoring_are_the_serial_ones(session, tmp_path, request):
    config, network, drawn, calibration = setting(tmp_path, images=300, reestimate_batchnorm=True)
    share = plan_resources(ray.cluster_resources(), config.cluster)
    spread = RayExecutor(put_network(network), network, drawn, config, share)
    request.addfinalizer(spread.close)
    serial = InProcessExecutor(network, calibration, torch.device("cpu"), config.search, config.seed)
    state = capture(network, Plan.empty())
    found, expected = (one.for_scoring(state).tensors for one in (spread, serial))
    assert found.keys() == expected.keys() == state.tensors.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    again = spread.for_scoring(state).tensors
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not torch.equal(found["layer3.2.bn2.running_mean"], state.tensors["layer3.2.bn2.running_mean"])
