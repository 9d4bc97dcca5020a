"""The importance of filters and the statistics for scoring on Ray tasks, against the serial ones."""

import pytest
import ray
import torch
from helpers import randomise_batchnorm, small_run

from laasp_ray import models
from laasp_ray.data.loader import normalise
from laasp_ray.data.sources import open_source
from laasp_ray.data.subset import draw_subset
from laasp_ray.distributed.cluster import share_of
from laasp_ray.distributed.executor import RayExecutor
from laasp_ray.distributed.trainer import put_network
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.search.activations import Wanted
from laasp_ray.search.evaluate import LossSubset
from laasp_ray.search.executor import InProcessExecutor

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]


def test_the_spread_importance_is_the_serial_one(session, tmp_path):
    config = small_run(tmp_path, search__images=60, search__batch_size=10)
    torch.manual_seed(0)
    network = randomise_batchnorm(models.build(config.model)).eval()
    drawn = draw_subset(open_source(config.data, "train"), config.data, images=60, seed=0)
    subset = LossSubset(drawn.images, drawn.labels, 10, lambda batch: normalise(batch, config.data))
    share = share_of(ray.cluster_resources(), config.cluster)
    spread = RayExecutor(put_network(network), network, drawn, config, share)
    serial = InProcessExecutor(network, subset, torch.device("cpu"), config.search, config.seed)
    wanted = Wanted(("layer1.0.conv1", "layer2.1.conv1", "layer3.2.conv1"), "max", 2)
    state = capture(network, Plan.empty())
    found, expected = (executor.importance(state, wanted) for executor in (spread, serial))
    for layer in wanted.layers:
        torch.testing.assert_close(found[layer], expected[layer], rtol=0, atol=1e-6)
    again = spread.importance(state, wanted)
    assert all(torch.equal(found[layer], again[layer]) for layer in wanted.layers)


def test_the_statistics_for_scoring_are_the_serial_ones(session, tmp_path):
    config = small_run(tmp_path, search__images=300, search__reestimate_batchnorm=True)
    torch.manual_seed(0)
    network = randomise_batchnorm(models.build(config.model)).eval()
    drawn = draw_subset(open_source(config.data, "train"), config.data, images=300, seed=0)
    subset = LossSubset(drawn.images, drawn.labels, 20, lambda batch: normalise(batch, config.data))
    share = share_of(ray.cluster_resources(), config.cluster)
    spread = RayExecutor(put_network(network), network, drawn, config, share)
    serial = InProcessExecutor(network, subset, torch.device("cpu"), config.search, config.seed)
    state = capture(network, Plan.empty())
    found, expected = (executor.for_scoring(state).tensors for executor in (spread, serial))
    assert found.keys() == expected.keys() == state.tensors.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    again = spread.for_scoring(state).tensors
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not torch.equal(found["layer3.2.bn2.running_mean"], state.tensors["layer3.2.bn2.running_mean"])
