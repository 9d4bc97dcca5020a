"""Networks that no run can work on are refused in a sentence that names the module, the reason and the remedy."""

import pytest
import torch
from extra_state import Keeping
from helpers import small_run
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from laasp_ray import models
from laasp_ray.config import ModelConfig
from laasp_ray.errors import ConfigError
from laasp_ray.models import registry
from laasp_ray.models.copying import deep_copy
from laasp_ray.models.suitable import check_suitable, not_finite
from laasp_ray.planning.dry_run import dry_run
from laasp_ray.run.preflight import prepare
from laasp_ray.search import rank

SHAPE = (3, 16, 16)


def network(change=lambda layer: layer, which=0):
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 12 * 12, 10)]
    layers[which] = change(layers[which])
    return nn.Sequential(*layers)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


REFUSED = {
    "weight_norm": (lambda: network(parametrizations.weight_norm), r"module 0 .*WeightNorm.*remove_parametrizations"),
    "linear": (lambda: network(parametrizations.weight_norm, 4), r"module 4 .*remove_parametrizations"),
    "spectral_norm": (lambda: network(parametrizations.spectral_norm, 2), r"module 2 .*Spectral.*remove_param"),
    "old weight_norm": (lambda: network(weight_norm), r"module 0 .*weight_norm.*remove_weight_norm\(model.*'weight'\)"),
    "old spectral_norm": (lambda: network(spectral_norm), r"module 0 .*spectral_norm.*remove_spectral_norm\(model"),
    "prune": (lambda: network(pruned, 2), r"module 2 .*prune\.remove\(model\.get_submodule\('2'\), 'weight'\)"),
    "scripted": (lambda: torch.jit.script(network()), r"the network is TorchScript.*nn\.Module that it was made from"),
    "traced": (lambda: torch.jit.trace(network(), torch.zeros(1, *SHAPE)), r"the network is TorchScript"),
    "scripted part": (lambda: network(torch.jit.script, 2), r"module 2 is TorchScript"),
    "compiled": (lambda: torch.compile(network(), backend="eager"), r"the network is compiled.*model\._orig_mod"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_every_start_refuses_what_cannot_be_cut(tmp_path, kind):
    build, sentence = REFUSED[kind]
    model = build()
    model(torch.zeros(1, *SHAPE))  # as a user would have, with gradients
    config = small_run(tmp_path, prune__flops_reduction=0.1)
    for start in (
        lambda: check_suitable(model),
        lambda: prepare(config, model),
        lambda: rank(model, torch.rand(4, *SHAPE), torch.arange(4)),
    ):
        with pytest.raises(ConfigError, match=sentence) as error:
            start()
        assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_the_remedies_work():
    model = network(parametrizations.weight_norm)
    torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule("0"), "weight")
    check_suitable(model)
    model = network(weight_norm)
    torch.nn.utils.remove_weight_norm(model.get_submodule("0"), "weight")
    check_suitable(model)
    model = network(pruned)
    prune.remove(model.get_submodule("0"), "weight")
    check_suitable(model)
    check_suitable(torch.compile(model, backend="eager")._orig_mod)


def builder_with_weight_norm():
    return network(parametrizations.weight_norm)


def test_the_dry_run_refuses_a_network_that_its_builder_made_so(tmp_path):
    config = small_run(tmp_path, model__builder=f"{__name__}:builder_with_weight_norm", model__arguments={})
    with pytest.raises(ConfigError, match=r"module 0 is parametrised .*remove_parametrizations"):
        dry_run(config, distributed=False)


def test_a_module_that_keeps_what_it_computed_can_be_copied():
    model = network()
    model[2].last = model(torch.zeros(1, *SHAPE))
    check_suitable(model)
    assert torch.equal(deep_copy(model)[2].last, model[2].last)


def test_extra_state_must_be_a_tensor():
    check_suitable(network(lambda _: Keeping(torch.zeros(2)), 1))
    with pytest.raises(ConfigError, match=r"module 1 keeps extra state of type dict, .* give a tensor"):
        check_suitable(network(lambda _: Keeping({"a": 1}), 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    model = network()
    model[2].weight.data[1, 2, 0, 0] = value
    with pytest.raises(ConfigError, match=r"not finite .* in 1 tensors \(2\.weight\)"):
        prepare(small_run(tmp_path), model)
    with pytest.raises(ConfigError, match=r"\(2\.weight\)"):
        rank(model, torch.rand(4, *SHAPE), torch.arange(4))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"weights\.safetensors are not finite .* in 1 tensors \(2\.weight\)"):
        models.load_weights(network(), tmp_path / "weights.safetensors")


def test_a_buffer_may_be_infinite_but_no_statistic():
    model = nn.BatchNorm2d(2)
    model.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    assert not_finite(model, model.state_dict()) == []
    model.running_var[0] = float("inf")
    assert not_finite(model, model.state_dict()) == ["running_var"]
    model.mask[0] = float("nan")
    assert not_finite(model, model.state_dict()) == ["running_var", "mask"]


def test_torchvisions_weights_of_auxiliary_heads_are_left_out_where_there_are_none(monkeypatch):
    config = ModelConfig(
        builder="torchvision.googlenet", arguments={"num_classes": 4, "aux_logits": True, "init_weights": False}
    )
    whole = models.build(config)
    monkeypatch.setattr(registry, "_torchvision_state", lambda builder, name: dict(whole.state_dict()))
    without = models.build(ModelConfig(builder=config.builder, arguments={**config.arguments, "aux_logits": False}))
    models.load_pretrained(without, config, "torchvision:IMAGENET1K_V1")
    assert torch.equal(without.fc.weight, whole.fc.weight)
