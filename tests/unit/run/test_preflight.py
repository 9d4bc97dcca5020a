"""What is found out before anything expensive starts, apart from what test_controller and test_cli meet."""

import json
import logging

import pytest
import torch
from helpers import small_run
from torch import nn

from laasp_ray import models
from laasp_ray.config import LaaspConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.criteria import pls as pls_module
from laasp_ray.data.loaders import registry as loader_module
from laasp_ray.errors import ConfigError, StoreError
from laasp_ray.methods import preparation, targets
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.run.preflight import check_workers, open_run, prepare
from laasp_ray.search.candidates import measure_baseline


def config_for(tmp_path, batch_size):
    return small_run(tmp_path, train__batch_size=batch_size)


@pytest.mark.parametrize(
    ("images", "batch_size", "workers", "smallest"),
    [
        # Batches of an epoch differ by one image at most: 10 in batches of at most 4 are 4, 3 and 3.
        (10, 4, 1, 3),
        (10, 4, 2, 1),  # 3 on two workers: 2 and 1
        (12, 4, 2, 2),
        (11, 4, 2, 1),  # 4, 4 and 3
        (8, 8, 4, 2),
        (9, 8, 2, 2),  # 5 and 4
        (9, 8, 3, 1),
        (3, 256, 1, 3),
        (3, 2, 1, 1),  # 2 and 1
        (1442, 128, 2, 60),  # the digits: 12 batches of 120 or 121
        (1, 2, 1, 1),
    ],
)
def test_every_worker_needs_two_images_of_every_batch(tmp_path, images, batch_size, workers, smallest):
    config = config_for(tmp_path, batch_size)
    if smallest >= 2:
        check_workers(config, images, workers)
        return
    with pytest.raises(ConfigError) as error:
        check_workers(config, images, workers)
    assert str(error.value) == (
        f"with {images} training images, train.batch_size {batch_size} and {workers} workers a worker would get "
        f"batches of {smallest}: raise train.batch_size or lower cluster.workers"
    )


def network(*, classes=10, features=768, width=4):
    """Takes 3 x 16 x 16 if `features` is 768 / 3 * width."""
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Flatten(), nn.Linear(features // 3 * width, classes))


def test_what_the_checks_made_is_handed_on(tmp_path):
    config = small_run(tmp_path, prune__flops_reduction=0.5)
    model = network().train()
    prepared = prepare(config, model)
    assert prepared.unpruned is model and model.training
    assert (len(prepared.train), len(prepared.test)) == (1442, 355)
    assert prepared.example_input.shape == (1, 3, 16, 16)
    # Convolution: 16 * 16 positions, 4 filters of 3 * 3 * 3 weights. Linear layer: 1024 inputs, 10 outputs.
    assert prepared.baseline.macs.total == 16 * 16 * 4 * 27 + 1024 * 10
    assert prepared.baseline.filters == {"0": 4}


def test_a_network_that_is_built_has_the_weights_that_the_seed_says(tmp_path):
    state = torch.get_rng_state()
    first, again = (prepare(small_run(tmp_path)).unpruned.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are touched
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = prepare(small_run(tmp_path, seed=1)).unpruned.state_dict()
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("classes", [9, 11])
def test_outputs_must_be_as_many_as_classes(tmp_path, classes):
    with pytest.raises(ConfigError, match=rf"has {classes} outputs, the training data 10 classes: .*num_classes"):
        prepare(small_run(tmp_path), network(classes=classes))


def test_a_network_that_does_not_take_the_input_shape_is_refused_with_its_reason(tmp_path):
    model = network(features=768 * 4)  # made for 32 x 32
    with pytest.raises(ConfigError, match=r"does not take an input of model\.input_shape \(3, 16, 16\): .*shapes"):
        prepare(small_run(tmp_path), model)
    assert model.training


@pytest.mark.parametrize("model", [nn.Conv2d(3, 10, 16), nn.LSTM(16, 10)], ids=["4 dimensions", "a tuple"])
def test_a_network_must_give_a_tensor_of_images_by_classes(tmp_path, model):
    class OneRow(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x if isinstance(self.inner, nn.Conv2d) else x[:, 0])

    with pytest.raises(ConfigError, match=r"must give one tensor of shape \(images, classes\)"):
        prepare(small_run(tmp_path), OneRow())


def fails(weights):
    raise KeyError("mine")


def wrong_shape(weights):
    return weights


def not_a_number(weights):
    return weights.sum(dim=1) * float("nan")


@pytest.mark.parametrize(
    ("criterion", "message"), [(fails, "KeyError: 'mine'"), (wrong_shape, "must give a tensor"), (not_a_number, "NaN")]
)
def test_a_criterion_of_ones_own_is_tried_before_anything_starts(tmp_path, criterion, message):
    name = f"{__name__}:{criterion.__name__}"
    with pytest.raises(ConfigError, match=f"tried on layer 0: criterion '{name}' .*{message}"):
        prepare(small_run(tmp_path, prune__criteria=["l1", name], prune__flops_reduction=0.5), network())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FailsInMerge", "tried on layer 0: criterion 'own_criteria:FailsInMerge' failed in merge: KeyError: 'mine'"),
        ("WrongScores", r"tried on layer 0: .* must give a tensor of shape \(4,\) for layer 0, gave \(4, 1\)"),
        ("NotANumber", "tried on layer 0: criterion 'own_criteria:NotANumber' gives NaN"),
        ("TooMany", r"^criterion 'own_criteria:TooMany' failed in check: ValueError: .*\(4, 1\)"),
        ("Unfinished", "is a class without accumulate, merge, scores"),
        ("Needing", "cannot be made of the options components, pooling"),
    ],
)
def test_a_criterion_of_data_of_ones_own_is_tried_too(tmp_path, name, message):
    config = small_run(tmp_path, prune__criteria=["l1", f"own_criteria:{name}"], prune__flops_reduction=0.5)
    with pytest.raises(ConfigError, match=message):
        prepare(config, network())


def test_a_loader_that_is_missing_is_told_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "_dali_problem", lambda: "No module named 'nvidia'")
    with pytest.raises(ConfigError, match=r"data\.loader is 'dali', but DALI cannot be imported"):
        prepare(small_run(tmp_path, data__loader="dali"), network())


def test_layers_that_are_left_alone_are_told_once(tmp_path, caplog):
    config = small_run(tmp_path, prune__ignored=["conv1"])
    with caplog.at_level(logging.INFO):
        prepare(config)
    assert [record.getMessage() for record in caplog.records].count("layer conv1 is not pruned: is ignored") == 1


def test_the_file_of_weights_is_needed_once_only(tmp_path):
    config = small_run(tmp_path, train__pretrained=str(tmp_path / "gone.pt"))
    with pytest.raises(ConfigError, match=r"no file of weights at .*gone\.pt: give its path with --pretrained"):
        prepare(config)
    prepare(config, started=True)


@pytest.mark.gpu
def test_a_network_on_a_gpu_is_copied_to_the_cpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = network().cuda()
    prepared = prepare(small_run(tmp_path, prune__flops_reduction=0.5), model)
    assert next(model.parameters()).is_cuda and next(prepared.unpruned.parameters()).is_cpu


def test_the_reachable_maximum_is_what_is_named(tmp_path):
    # 3 of the 4 filters may go, and with them 3/4 of the convolution's and of the linear layer's accumulates.
    with pytest.raises(
        ConfigError,
        match=r"flops_reduction is 0\.8, .*max_pruned 0\.75 and 1 prunable layers at most "
        r"0\.7500 can be reached",
    ):
        prepare(small_run(tmp_path, prune__flops_reduction=0.8), network())
    prepare(small_run(tmp_path, prune__flops_reduction=0.75), network())


def test_a_target_of_just_what_can_be_reached_is_taken_although_shares_are_rounded():
    # 9 of 10 filters stay: 1 - 45 / 50 is less than 0.1.
    model, example = nn.Sequential(nn.Conv2d(3, 10, 1), nn.Conv2d(10, 2, 1)).eval(), torch.zeros(1, 3, 4, 4)
    graph, config = PruningGraph(model, example), LaaspConfig(flops_reduction=0.1, max_pruned=0.1)
    baseline = measure_baseline(graph, count_macs(model, example), config)
    preparation._check_target(config, graph, baseline, list(graph.layers), 0.1)
    with pytest.raises(ConfigError, match=r"flops_reduction is 0\.101, .* at most 0\.1000 can be reached"):
        deeper = LaaspConfig(flops_reduction=0.101, max_pruned=0.1)
        preparation._check_target(deeper, graph, baseline, list(graph.layers), 0.1)


def test_a_target_for_parameters_is_checked_like_that_for_flops(tmp_path):
    # 3 of the 4 filters may go: of 4 * 27 + 4 parameters of the convolution 3/4, of 10 * 1024 + 10 of the layer behind
    # 3/4 of the weights.
    most = (3 * 28 + 7680) / (112 + 10250)
    assert f"{most:.4f}" == "0.7493"
    only = {"prune__flops_reduction": 0.0}
    prepare(small_run(tmp_path, prune__parameters_reduction=0.749, **only), network())
    with pytest.raises(
        ConfigError, match=r"prune\.parameters_reduction is 0\.75, .*max_pruned 0\.75 and 1 .* at most 0\.7493 can"
    ):
        prepare(small_run(tmp_path, prune__parameters_reduction=0.75, **only), network())
    prepare(small_run(tmp_path, prune__parameters_reduction=0.75, prune__iterations=1, **only), network())


def test_what_rounding_leaves_out_of_reach_is_named(tmp_path):
    halves = {"prune__round_to": 2, "prune__max_pruned": 0.7}  # 2 of the 4 filters may go
    prepare(small_run(tmp_path, prune__flops_reduction=0.5, **halves), network())
    with pytest.raises(ConfigError, match=r"0\.51, .*max_pruned 0\.7, prune\.round_to 2 and 1 .* at most 0\.5000 can"):
        prepare(small_run(tmp_path, prune__flops_reduction=0.51, **halves), network())
    with pytest.raises(ConfigError, match=r"method pls, prune\.round_to 3 and 1 prunable layers at most 0\.2500 can"):
        prepare(small_run(tmp_path, prune__flops_reduction=0.5, prune__round_to=3, prune__method="pls"), network())


def test_what_latency_can_be_reached_nobody_knows_before(tmp_path):
    latency = {"prune__flops_reduction": 0.0, "prune__latency_reduction": 0.99}
    prepare(small_run(tmp_path, **latency), network())
    for wanted in (latency, {"prune__flops_reduction": 0.5}):
        with pytest.raises(ConfigError, match=r"no layer of the network can be pruned \(0: is ignored\)"):
            prepare(small_run(tmp_path, prune__ignored=["0"], **wanted), network())
    with pytest.raises(
        ConfigError, match=r"round_to 8 none of 1 layers can give a single filter: .*lower prune\.round_to"
    ):
        prepare(small_run(tmp_path, prune__round_to=8, **latency), network())


def test_a_latency_batch_that_does_not_fit_is_refused_before_anything_starts(tmp_path, monkeypatch):
    def too_big(*given, **settings):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(targets, "measure_pair", too_big)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "small GPU")
    latency = {"prune__flops_reduction": 0.0, "prune__latency_reduction": 0.5, "prune__latency_batch": 4096}
    with pytest.raises(ConfigError, match=r"prune\.latency_batch is 4096, .*small GPU: lower it"):
        prepare(small_run(tmp_path, **latency), network())


def test_statistics_need_a_batchnorm(tmp_path):
    with pytest.raises(ConfigError, match=r"search\.reestimate_batchnorm is True, but the network has no BatchNorm"):
        prepare(small_run(tmp_path, prune__flops_reduction=0.5, search__reestimate_batchnorm=True), network())
    prepare(small_run(tmp_path, search__reestimate_batchnorm=True))


@pytest.mark.parametrize(("racing", "told"), [("on", 1), ("off", 0)])
def test_several_prunes_a_iteration_and_racing_do_not_go_well_together(tmp_path, caplog, racing, told):
    config = small_run(tmp_path, prune__prunes_per_iteration=3, search__racing=racing)
    with caplog.at_level(logging.WARNING):
        prepare(config)
    found = [record.getMessage() for record in caplog.records if "prunes_per_iteration is 3" in record.getMessage()]
    assert len(found) == told and all("set search.racing=off" in text for text in found)


def test_what_pls_can_reach_is_what_layers_of_their_own_can_give(tmp_path):
    pls = {"prune__method": "pls"}
    # Of the 4 filters all but one may go, and with them 3/4.
    prepare(small_run(tmp_path, prune__flops_reduction=0.75, **pls), network())
    with pytest.raises(ConfigError, match=r"0\.8, but with prune\.method pls and 1 prunable layers at most 0\.7500 "):
        prepare(small_run(tmp_path, prune__flops_reduction=0.8, **pls), network())
    prepare(small_run(tmp_path, prune__flops_reduction=0.8, prune__iterations=2, **pls), network())


def test_pls_needs_a_layer_of_its_own(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.fc = nn.Linear(4, 10)

        def forward(self, x):
            return self.fc((self.a(x) + self.b(x)).mean((2, 3)))

    with pytest.raises(ConfigError, match="all layers of this network are coupled to others"):
        prepare(small_run(tmp_path, prune__method="pls", prune__flops_reduction=0.5), Tied())


@pytest.mark.parametrize("change", [{"prune__method": "pls"}, {"prune__criteria": ["l1", "pls"]}])
def test_features_that_do_not_fit_into_memory_are_refused_before_anything_starts(tmp_path, monkeypatch, change):
    monkeypatch.setattr(pls_module, "MEMORY_SHARE", 1e-9)
    with pytest.raises(ConfigError, match=r"prune\.pooling 'max1x1' gives 1024 features"):
        prepare(small_run(tmp_path, prune__flops_reduction=0.5, prune__pooling="max1x1", **change), network())


def test_cluster_and_place_may_differ_when_a_run_is_resumed(tmp_path):
    config = small_run(tmp_path)
    storage = open_run(config)
    storage.write("config.json", json.dumps(config.to_dict()).encode())
    open_run(small_run(tmp_path, cluster__workers=1, data__threads=2))
    with pytest.raises(ConfigError, match=r"search\.images: 40 there, 41 here\): give the same settings"):
        open_run(small_run(tmp_path, search__images=41))


def test_nothing_is_left_behind_by_the_check_that_the_store_can_be_written(tmp_path):
    open_run(small_run(tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        open_run(small_run(tmp_path / "file" / "runs"))


def test_a_batchnorm_without_running_statistics_is_refused_before_anything_starts(tmp_path):
    config = small_run(tmp_path)
    model = models.build(config.model)
    name, norm = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    with pytest.raises(ConfigError, match=f"{name} is a BatchNorm without running statistics"):
        prepare(config, model)


def test_a_frozen_batchnorm_stays_in_eval_mode(tmp_path):
    config = small_run(tmp_path)
    model = models.build(config.model).train()
    norms = {name: module.eval() for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    prepare(config, model)
    assert {name for name, module in model.named_modules() if not module.training} == set(norms)
