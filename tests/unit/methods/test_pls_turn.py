"""One iteration of PLS: what is chosen, that it is one plan of many layers, and how many filters go iteration by
iteration."""

import dataclasses
import itertools

import pytest
import torch
from fakes import FakeExecutor
from helpers import first_standing, iterations_of, randomise_batchnorm, shared_data, vip_by_scikit_learn
from torch import nn

from laasp_ray import models
from laasp_ray.config import ModelConfig, PlsConfig, SearchConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.criteria.pls import Pls
from laasp_ray.data.calibration import draw_calibration_images
from laasp_ray.data.loaders.decoding import normalise
from laasp_ray.data.sources.registry import open_source
from laasp_ray.errors import ExhaustedError, SearchError
from laasp_ray.methods.pls import PlsPruning, choose, removed_by
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.joint import independent_layers
from laasp_ray.recipes import recipe
from laasp_ray.records import MeasuredLoss
from laasp_ray.search.activations import ImportanceRequest, chunks_of, measure_first_batch, scores_of, state_of
from laasp_ray.search.evaluate import CalibrationSet
from laasp_ray.search.executor import InProcessExecutor

EXAMPLE = torch.zeros(1, 3, 32, 32)
CONFIG = PlsConfig(flops_reduction=0.9)


class RandomScores(FakeExecutor):
    """An executor whose scores are random numbers, and who measures nothing."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(0)

    def importance(self, network, wanted):
        filters = {name: network.tensors[f"{name}.weight"].shape[0] for name in wanted.layers}
        return {name: torch.rand(count, generator=self._generator) for name, count in filters.items()}

    def measure(self, network, tasks, on_result, on_share, images=None, memory=None):
        return [MeasuredLoss(1.0, 10, 0.0) for _ in tasks]


def iterations(model, executor, count, example=EXAMPLE):
    """`count` iterations, each on the physically pruned network: (iteration, network after it)."""
    for iteration, _, after in itertools.islice(
        iterations_of(PlsPruning(), first_standing(model, example, CONFIG, executor)), count
    ):
        yield iteration, after


def chosen(scores, blocks, percent, round_to=1):
    return choose(scores, blocks, removed_by(percent, sum(map(len, scores.values()))), round_to)


def removed(iteration):
    return {prune.layer: prune.filters for prune in iteration.decision.prunes}


def removed_in_all(found):
    totals, total = [], 0
    for iteration, _ in found:
        total += sum(len(filters) for filters in removed(iteration).values())
        totals.append(total)
    return totals


def test_resnet56_loses_as_many_filters_as_published_iteration_by_iteration():
    model = models.build(recipe("resnet56_cifar10").model).eval()
    example = EXAMPLE[:, :, :8, :8]  # what is coupled does not depend on the images' size
    found = list(iterations(model, RandomScores(), 9, example))
    totals = removed_in_all(found)
    assert (totals[0], totals[4], totals[8]) == (101, 413, 618)
    allowed = {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(9)}
    assert set().union(*(removed(iteration) for iteration, _ in found)) == allowed
    # What is left of the network is what the decisions say, and runs.
    last_iteration, last = found[-1]
    assert sum(last.get_submodule(name).out_channels for name in allowed) == 1008 - 618
    macs = count_macs(models.build(recipe("resnet56_cifar10").model).eval(), example).total
    assert last_iteration.decision.flops_reduction == pytest.approx(
        1 - count_macs(last, example).total / macs, abs=1e-12
    )


def test_resnet50_loses_a_tenth_of_the_filters_inside_its_blocks():
    torch.manual_seed(0)
    model = randomise_batchnorm(models.build(recipe("resnet50_imagenet").model)).eval()
    example = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # Two of each bottleneck's three convolutions are coupled to nothing, of stages of 3, 4, 6 and 3 blocks.
    widths = {
        f"layer{stage}.{block}.conv{number}": 32 * 2**stage
        for stage, blocks in enumerate((3, 4, 6, 3), 1)
        for block in range(blocks)
        for number in (1, 2)
    }
    # Nor is the first convolution, which lies before all blocks: its outputs are read by a shortcut, not added to one.
    assert independent_layers(PruningGraph(model, example)) == ("conv1", *widths)
    config = dataclasses.replace(CONFIG, ignored=("conv1",))
    iteration, _, pruned = next(iterations_of(PlsPruning(), first_standing(model, example, config, RandomScores())))
    gone = {layer: len(filters) for layer, filters in removed(iteration).items()}
    assert sum(widths.values()) == 7552 and sum(gone.values()) == 755
    assert gone.keys() <= widths.keys()
    left = {layer: width - gone.get(layer, 0) for layer, width in widths.items()}
    for name, module in pruned.named_modules():
        if isinstance(module, nn.Conv2d):
            before, (block, _, own) = model.get_submodule(name), name.rpartition(".")
            read = {"conv2": f"{block}.conv1", "conv3": f"{block}.conv2"}.get(own)
            shape = (left.get(name, before.out_channels), left[read] if read else before.in_channels)
            assert (module.out_channels, module.in_channels) == module.weight.shape[:2] == shape, name
    with torch.inference_mode():
        outputs = pruned(example)
    assert outputs.shape == (1, 1000) and outputs.isfinite().all()
    reduction = 1 - count_macs(pruned, example).total / count_macs(model, example).total
    assert iteration.decision.flops_reduction == pytest.approx(reduction, abs=1e-12)


@pytest.fixture(scope="module")
def resnet56():
    """The network of the shared checkpoint, and 1,000 real images."""
    config = recipe("resnet56_cifar10")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(shared_data("cifar10_mini"))))
    model = models.build(config.model).eval()
    models.load_weights(model, shared_data("checkpoints/resnet56_epoch60.safetensors"))
    calibration = draw_calibration_images(open_source(config.data, "train"), config.data, images=1000, seed=0)
    return model, CalibrationSet(
        calibration.images, calibration.labels, 250, lambda batch: normalise(batch, config.data)
    )


@pytest.mark.exhaustive
def test_resnet56_on_real_images_loses_as_many_filters_as_published(resnet56):
    model, calibration = resnet56
    executor = InProcessExecutor(model, calibration, torch.device("cpu"), SearchConfig(), 0)
    found = list(iterations(model, executor, 9))
    totals = removed_in_all(found)
    assert (totals[0], totals[4], totals[8]) == (101, 413, 618)
    assert all(prune.criterion == "pls" for iteration, _ in found for prune in iteration.decision.prunes)


def test_scores_choose_over_all_layers_at_once():
    scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "b": torch.tensor([0.0, 6.0]), "c": torch.tensor([7.0, 8.0, 2.0])}
    ones = dict.fromkeys(scores, 1)
    assert chosen(scores, ones, 37.5) == {"a": (1,), "b": (0,), "c": (2,)}
    assert chosen(scores, ones, 50) == {"a": (1, 2), "b": (0,), "c": (2,)}
    assert chosen(scores, ones, 1) == {"b": (0,)}  # one at least
    assert chosen(scores, ones, 31.2) == {"a": (1,), "b": (0,)}  # 2.496 is nearest to 2
    assert chosen(scores, ones, 31.25) == {"a": (1,), "b": (0,), "c": (2,)}  # 2.5 is 3


@pytest.mark.parametrize(
    ("target", "exact", "gone"),
    [
        # Layers of 2 x 10, 10 x 10 and 10 x 1 multiply-accumulates a place, 130: the lowest scores are those
        # of "0", then of "1", in order. A filter of "0" takes 2 + 10, one of "1" then 10 - 4 + 1 of what is left.
        (12 / 130, True, {"0": 1}),
        (13 / 130, True, {"0": 2}),
        (48 / 130, True, {"0": 4}),
        (55 / 130, True, {"0": 4, "1": 1}),
        (56 / 130, True, {"0": 4, "1": 2}),
        (12 / 130, False, {"0": 4, "1": 4}),  # 40% of 20
        (0.9, True, {"0": 4, "1": 4}),  # not reached in this iteration
    ],
)
def test_the_last_prune_takes_no_more_filters_than_the_target_needs(target, exact, gone):
    class Rising(RandomScores):
        def importance(self, network, wanted):
            scores = torch.arange(10.0)
            return {"0": torch.cat([scores[:4], scores[4:] + 100]), "1": scores + 4}

    model = nn.Sequential(nn.Conv2d(2, 10, 1), nn.Conv2d(10, 10, 1), nn.Conv2d(10, 1, 1)).eval()
    config = PlsConfig(flops_reduction=target, percent=40, exact_target=exact)
    context = first_standing(model, torch.zeros(1, 2, 4, 4), config, Rising())
    iteration = PlsPruning().iterate(context)
    assert {layer: len(filters) for layer, filters in removed(iteration).items()} == gone
    assert iteration.decision.flops_reduction >= target or target == 0.9


def test_more_filters_may_reach_less_where_a_layer_would_vanish_and_the_fewest_that_reach_it_go():
    class Rising(RandomScores):
        def importance(self, network, wanted):
            return {"0": torch.tensor([0.0, 2.0]), "1": torch.arange(3.0, 23.0)}

    # 9 x 2, 2 x 20 and 20 x 1 multiply-accumulates a place: 78. One filter of "0" takes 9 + 20. Two would be all of it,
    # so that "1" gives them, for 2 + 1 each: 10 and more of these reach it, too, and so do 13.
    model = nn.Sequential(nn.Conv2d(9, 2, 1), nn.Conv2d(2, 20, 1), nn.Conv2d(20, 1, 1)).eval()
    config = PlsConfig(flops_reduction=0.35, percent=60)  # 13 of 22
    context = first_standing(model, torch.zeros(1, 9, 4, 4), config, Rising())
    assert {layer: len(filters) for layer, filters in removed(PlsPruning().iterate(context)).items()} == {"0": 1}


def test_equal_scores_go_by_layer_and_index():
    assert chosen({"a": torch.ones(3), "b": torch.ones(3)}, {"a": 1, "b": 1}, 33) == {"a": (0, 1)}


def test_a_layer_that_would_vanish_keeps_its_filters_and_others_give_more():
    scores = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([5.0, 2.0, 3.0, 4.0])}
    assert chosen(scores, {"a": 1, "b": 1}, 34) == {"b": (1, 2)}
    assert chosen(scores, {"a": 1, "b": 1}, 17) == {"a": (0,)}


def test_blocks_lose_the_same_count_each():
    scores = {"grouped": torch.tensor([0.0, 1.0, 2.0, 9.0, 8.0, 7.0]), "plain": torch.full((4,), 5.0)}
    # The three lowest are all of the first block: one from each goes, and what does not divide stays.
    assert chosen(scores, {"grouped": 2, "plain": 1}, 30) == {"grouped": (0, 5)}


def test_when_nothing_can_go_it_is_said():
    with pytest.raises(SearchError, match=r"of 2 layers none can give filters when 4 are to go"):
        chosen({"a": torch.zeros(2), "b": torch.ones(2)}, {"a": 1, "b": 1}, 99)
    with pytest.raises(SearchError, match="one filter of each of its blocks"):
        chosen({"a": torch.arange(4.0)}, {"a": 4}, 25)


def test_the_filter_that_tells_nothing_goes_first_and_the_prune_is_measured():
    torch.manual_seed(0)
    model = randomise_batchnorm(models.build(ModelConfig(builder="cifar.resnet20", input_shape=(3, 16, 16)))).eval()
    with torch.no_grad():
        for name, index in (("layer1.1.conv1", 5), ("layer3.0.conv1", 40)):
            model.get_submodule(name).weight[index] = 0
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(60, 3, 16, 16, generator=generator), torch.arange(60) % 10
    calibration = CalibrationSet(images, labels, 20)
    executor = InProcessExecutor(model, calibration, torch.device("cpu"), SearchConfig(), 0)
    ((iteration, pruned),) = iterations(model, executor, 1, EXAMPLE[:, :, :16, :16])
    assert sum(len(filters) for filters in removed(iteration).values()) == 34  # of 3 x (16 + 32 + 64) = 336
    assert 5 in removed(iteration)["layer1.1.conv1"] and 40 in removed(iteration)["layer3.0.conv1"]
    assert len(iteration.ranking) == 0 and iteration.seconds.keys() == {"graph", "score", "evaluate"}
    with torch.inference_mode():
        for loss, network in ((iteration.decision.loss_before, model), (iteration.decision.loss, pruned)):
            assert loss == pytest.approx(float(nn.functional.cross_entropy(network(images), labels)), abs=1e-4)


@pytest.mark.parametrize("images", [200, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_vip_of_real_activations_equals_scikit_learn(resnet56, images):
    model, drawn = resnet56
    calibration = CalibrationSet(drawn.images[:images], drawn.labels[:images], images // 4, drawn.prepare)
    layers = tuple(f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(9))
    outputs = {name: [] for name in layers}

    def keep(name):
        return lambda module, inputs, output: outputs[name].append(output.amax((2, 3)))

    wanted = ImportanceRequest(layers, "pls", Pls(1, "max"))
    look = measure_first_batch(model, calibration, wanted)
    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    chunks = chunks_of(images, images // 4)
    moments = [state_of(model, calibration, wanted, look, chunk) for chunk in chunks]
    for hook in hooks:
        hook.remove()
    features = torch.cat([torch.cat(outputs[name]) for name in layers], dim=1)
    assert features.shape == (images, 1008) and len(moments) == 4
    for components in (1, 2, 5):
        found = scores_of(moments, look, dataclasses.replace(wanted, criterion=Pls(components, "max")))
        joint = torch.cat([found[name] for name in layers])
        reference = vip_by_scikit_learn(features, calibration.labels, components)
        assert float((joint - reference).abs().max()) < 1e-6
        assert float(joint.square().mean()) == pytest.approx(1, abs=1e-12)


def test_what_is_left_of_a_layer_is_a_multiple():
    scores = {"a": torch.arange(16.0), "b": torch.arange(100.0, 112.0)}
    ones = dict.fromkeys(scores, 1)
    # Of 28 filters 12, all of them of `a`: 8 may go, 8 stay.
    assert chosen(scores, ones, 43, 8) == {"a": tuple(range(8))}
    # 6 are too few: more are taken until `a` can give 8.
    assert chosen(scores, ones, 21, 8) == {"a": tuple(range(8))}
    # 15 of `a`: 12 may go.
    assert chosen(scores, ones, 54, 4) == {"a": tuple(range(12))}
    # Two blocks and multiples of 3: `c` keeps 6 of 12, three of each block.
    blocks = {"c": 2, "d": 1}
    grouped = {"c": torch.arange(12.0), "d": torch.arange(50.0, 62.0)}
    assert chosen(grouped, blocks, 25, 3) == {"c": (0, 1, 2, 6, 7, 8)}


def test_a_multiple_that_no_layer_can_keep_is_named():
    with pytest.raises(ExhaustedError, match=r"of 1 layers none .* a multiple of 8 \(prune\.round_to\)"):
        chosen({"a": torch.arange(8.0)}, {"a": 1}, 25, 8)
