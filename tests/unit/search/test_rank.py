"""The search without a cluster: what is proposed, what it costs, what is chosen."""

import copy
import math

import pytest
import torch
from helpers import randomise_batchnorm
from plain_losses import mean_loss
from torch import nn
from torch.nn import functional

from laasp_ray import models
from laasp_ray.config import DEFAULT_CRITERIA, ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.errors import ConfigError, SearchError
from laasp_ray.search import rank
from laasp_ray.search.evaluate import CalibrationSet


class TwoLayers(nn.Module):
    """conv (4 filters) -> relu -> conv (3 filters) -> mean -> linear: small enough to prune by hand."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 3, 1)
        self.head = nn.Linear(3, 2)

    def forward(self, images):
        features = functional.relu(self.first(images))
        return self.head(functional.relu(self.second(features)).mean((2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return TwoLayers()


@pytest.fixture
def images():
    return torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.arange(12) % 2


def without_filters(network, images, layer, filters):
    """The logits of TwoLayers when `filters` of `layer` are gone, with the tensors cut by hand."""
    first_kept = [i for i in range(4) if layer != "first" or i not in filters]
    second_kept = [i for i in range(3) if layer != "second" or i not in filters]
    first, second, head = network.first, network.second, network.head
    features = functional.relu(functional.conv2d(images, first.weight[first_kept], first.bias[first_kept], padding=1))
    weight = second.weight[second_kept][:, first_kept]
    features = functional.relu(functional.conv2d(features, weight, second.bias[second_kept]))
    return functional.linear(features.mean((2, 3)), head.weight[:, second_kept], head.bias)


def test_losses_are_those_of_the_network_cut_by_hand(network, images, labels):
    ranking = rank(network, images, labels, criteria=("l1", "l2"), step=0.3, batch_size=5, compensate="off")
    assert {entry.layer for entry in ranking} == {"first", "second"}
    for entry in ranking:
        expected = functional.cross_entropy(without_filters(network, images, entry.layer, entry.filters), labels)
        assert entry.loss == pytest.approx(expected.item(), rel=1e-5)
    assert [entry.loss for entry in ranking] == sorted(entry.loss for entry in ranking)


def test_by_default_prunes_are_made_up_for_and_obs_is_in_the_pool(network, images, labels):
    made_up = rank(network, images, labels, step=0.3)
    again = rank(network, images, labels, step=0.3, compensate="full", criteria=(*DEFAULT_CRITERIA, "obs"))
    plain = rank(network, images, labels, step=0.3, compensate="off")
    assert [(entry.layer, entry.filters, entry.loss) for entry in made_up] == [
        (entry.layer, entry.filters, entry.loss) for entry in again
    ]
    assert {name for entry in made_up for name in proposers(entry)} == {*DEFAULT_CRITERIA, "obs"}
    assert {name for entry in plain for name in proposers(entry)} == set(DEFAULT_CRITERIA)
    losses = {(entry.layer, entry.filters): entry.loss for entry in plain}
    shared = [entry for entry in made_up if (entry.layer, entry.filters) in losses]
    assert shared and all(entry.loss != losses[entry.layer, entry.filters] for entry in shared)


def proposers(entry):
    return {entry.criterion, *(name for _, name in entry.candidate.also)}


def test_step_sizes_and_reductions_are_shares_of_the_multiply_accumulates(network, images, labels):
    # Per image 36 positions: first 36*4*9 = 1296, second 36*3*4 = 432, head 6: 1734 in all.
    # A filter of first takes 36*9 + 36*3 = 432 = 24.9%: one is nearest to 30%.
    # A filter of second takes 36*4 + 2 = 146 = 8.42%: 30 / 8.42 = 3.56, so 4, but the limit floor(0.75 * 3) leaves 2.
    ranking = rank(network, images, labels, criteria=("l1",), step=0.3)
    found = {entry.layer: (len(entry.filters), entry.flops_reduction) for entry in ranking}
    assert found == {"first": (1, pytest.approx(432 / 1734)), "second": (2, pytest.approx(292 / 1734))}


def test_the_criterion_picks_the_filters(network, images, labels):
    norms = network.first.weight.detach().flatten(1).abs().sum(1)
    ranking = rank(network, images, labels, criteria=("l1",), step=0.3)
    entry = next(entry for entry in ranking if entry.layer == "first")
    assert entry.filters == (int(norms.argmin()),)


def test_equal_picks_are_one_candidate_credited_to_the_first_of_the_pool(network, images, labels):
    with torch.no_grad():  # filter 2 is far the smallest by either norm
        network.first.weight[2] *= 1e-3
    ranking = rank(network, images, labels, criteria=("l2", "l1"), step=0.3)
    entry = next(entry for entry in ranking if entry.layer == "first")
    assert (entry.filters, entry.criterion, entry.candidate.also) == ((2,), "l2", (("first", "l1"),))
    assert sum(entry.layer == "first" for entry in ranking) == 1


def test_reference_gives_step_sizes_and_limits(network, images, labels):
    once = next(e for e in rank(network, images, labels, criteria=("l1",), step=0.3) if e.layer == "second")
    pruned = copy.deepcopy(network)
    kept = [i for i in range(3) if i not in once.filters]
    pruned.second = nn.Conv2d(4, 1, 1)
    pruned.head = nn.Linear(1, 2)
    with torch.no_grad():
        pruned.second.weight.copy_(network.second.weight[kept])
    ranking = rank(pruned, images, labels, criteria=("l1",), step=0.3, reference=network)
    assert {entry.layer for entry in ranking} == {"first"}
    # first: 1 filter of 4; second has 1 of 3 left. 36*3*9 + 36*3 + 2 of the reference's 1734 remain.
    assert ranking[0].flops_reduction == pytest.approx(1 - (36 * 27 + 36 * 3 + 2) / 1734)


def test_ignored_layers_make_no_candidates(network, images, labels):
    ranking = rank(network, images, labels, ignored=("first",), step=0.3)
    assert {entry.layer for entry in ranking} == {"second"}


def test_the_model_is_left_as_it_was(network, images, labels):
    network.train()
    before = copy.deepcopy(network.state_dict())
    rank(network, images, labels, step=0.3)
    assert network.training
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.items())


def test_batches_do_not_change_the_mean(network, images, labels):
    whole = mean_loss(network, CalibrationSet(images, labels, 12))
    parts = mean_loss(network, CalibrationSet(images, labels, 5))  # 5 + 5 + 2
    expected = functional.cross_entropy(network(images), labels).item()
    assert whole == pytest.approx(expected, rel=1e-6)
    assert parts == pytest.approx(expected, rel=1e-6)


def test_prepare_is_applied_to_every_batch(network, labels):
    pixels = torch.randint(0, 256, (12, 1, 6, 6), dtype=torch.uint8)
    loss = mean_loss(network, CalibrationSet(pixels, labels, 5, lambda batch: batch.float() / 255))
    assert loss == pytest.approx(functional.cross_entropy(network(pixels.float() / 255), labels).item(), rel=1e-6)


def test_bad_arguments_are_refused(network, images, labels):
    with pytest.raises(SearchError, match="12 images and 11 labels"):
        rank(network, images, labels[:-1])
    with pytest.raises(ConfigError, match="no_such"):
        rank(network, images, labels, criteria=("no_such",))
    with pytest.raises(ConfigError, match=r"prune\.step"):
        rank(network, images, labels, step=2.0)
    with pytest.raises(SearchError, match="no layer has a filter left"):
        rank(network, images, labels, max_pruned=0.01)


def test_resnet20_proposes_every_convolution_by_every_criterion():
    torch.manual_seed(0)
    model = randomise_batchnorm(models.build(ModelConfig(builder="cifar.resnet20", input_shape=(3, 32, 32))))
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    ranking = rank(model, images, labels, compensate="off")
    proposals = sum(1 + len(entry.candidate.also) for entry in ranking)
    assert proposals == 21 * 4  # 19 convolutions of 3x3 and two shortcuts
    assert len({entry.layer for entry in ranking}) == 21
    assert all(math.isfinite(entry.loss) for entry in ranking)
    total = count_macs(model, images[:1]).total
    assert total == pytest.approx(40.81e6, rel=1e-3)


@pytest.fixture(scope="module")
def many():
    """A network with more filters to choose from, and enough images for a race."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 3), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(24, 3)).eval()
    images = torch.randn(600, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        network[-1].weight *= 20  # confident of most images, unsure of a few
        labels = network(images).argmax(1)
    return network, images, labels


def keys(ranking):
    return {(entry.layer, entry.filters): entry for entry in ranking}


def test_racing_makes_the_exhaustive_choice_with_fewer_images(many):
    exhaustive, raced = rank(*many, step=0.1), rank(*many, step=0.1, racing=True)
    assert (raced[0].layer, raced[0].filters) == (exhaustive[0].layer, exhaustive[0].filters)
    assert keys(raced).keys() == keys(exhaustive).keys()
    assert {(entry.images, entry.dropped_at) for entry in exhaustive} == {(600, None)}
    dropped = [entry.dropped_at is not None for entry in raced]
    assert dropped == sorted(dropped)
    assert not dropped[0]
    assert sum(dropped) > len(raced) / 2
    for entry in raced:
        assert entry.dropped_at is None or (entry.dropped_at >= 1 and 0 < entry.images < 600)
        if entry.images == 600:
            assert entry.loss == pytest.approx(keys(exhaustive)[entry.layer, entry.filters].loss, rel=1e-6)
    # The images that a candidate saw go up with the look at which it fell.
    looks = sorted({(entry.dropped_at, entry.images) for entry in raced if entry.dropped_at is not None})
    assert len({look for look, _ in looks}) == len(looks)
    assert [images for _, images in looks] == sorted(images for _, images in looks)


def test_another_seed_draws_other_samples_and_makes_the_same_choice(many):
    one, other, again = (rank(*many, step=0.1, racing=True, seed=seed) for seed in (1, 2, 1))
    assert (one[0].layer, one[0].filters) == (other[0].layer, other[0].filters)
    losses = [{key: entry.loss for key, entry in keys(ranking).items()} for ranking in (one, other, again)]
    assert losses[0] != losses[1]
    assert losses[0] == losses[2]


@pytest.mark.parametrize("racing", [True, False])
def test_too_little_memory_is_refused_with_what_is_needed(many, racing):
    _, images, labels = many
    with pytest.raises(
        SearchError, match=r"one image needs \d+\.\d MB of memory, 1\.0 MB may be used: raise search\.mem"
    ):
        wide = nn.Sequential(nn.Conv2d(1, 512, 3), nn.ReLU(), nn.Conv2d(512, 4, 6), nn.Flatten(), nn.Linear(4, 3))
        pictures = functional.interpolate(images[:2], scale_factor=8)
        wide[2] = nn.Sequential(nn.Conv2d(512, 4, 6), nn.AdaptiveAvgPool2d(1))
        rank(wide.eval(), pictures, labels[:2], racing=racing, memory_mb=1)


class Moody(nn.Module):
    """Raises when it is run on a batch with fewer channels than it was made for."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, features):
        if features.shape[1] < self.channels and len(features) > 1:  # the dependency graph tries prunes on one image
            raise RuntimeError(f"only {features.shape[1]} channels")
        return functional.relu(features)


@pytest.mark.parametrize("racing", [True, False])
def test_a_candidate_whose_module_raises_comes_last_and_says_why(many, racing):
    _, images, labels = many
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), Moody(6), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(24, 3)
    )
    ranking = rank(network, images, labels, step=0.1, racing=racing)
    failed = [entry for entry in ranking if entry.error]
    assert 0 < len(failed) < len(ranking)
    assert list(ranking[-len(failed) :]) == failed
    assert {entry.layer for entry in failed} == {"2"}
    for entry in failed:
        assert entry.error == f"RuntimeError: only {6 - len(entry.filters)} channels"
        assert math.isnan(entry.loss)
    assert math.isfinite(ranking[0].loss)
