"""ConvNeXts and vision transformers: norms over channels are masked by an exact rule, hidden layers, heads and the
embedding are pruned, and every candidate's loss is that of the physically pruned copy."""

import dataclasses

import numpy as np
import pytest
import torch
from fakes import Scripted
from helpers import first_standing
from plain_losses import loss_of_copy
from torch import nn
from torchvision.models import ConvNeXt, VisionTransformer
from torchvision.models.convnext import CNBlockConfig

from laasp_ray.config import LaaspConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.methods.laasp import Laasp
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan, apply_plan
from laasp_ray.pruning.verify import clone_sharing_parameters, scramble
from laasp_ray.search.candidates import counts_of, measure_baseline, not_made_up, propose, tasks_of
from laasp_ray.search.compensating import CompensationMemory, Measured
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, ready
from laasp_ray.search.grams import grams
from laasp_ray.search.ranking import rank

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)
MORE = ("blocks.*", "encoder.*", "stages.*", "features.*")


def of_timm(name, **arguments):
    return pytest.importorskip("timm").create_model(name, num_classes=5, **arguments)


def vit(**arguments):
    small = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 4}
    return of_timm("vit_tiny_patch16_224", **{**small, **arguments})


def torchvisions_convnext():
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5)


NETWORKS = {
    "timm's convnext": (lambda: of_timm("convnext_atto", depths=(1,) * 4, dims=(8, 8, 12, 16)), 16),
    "timm's convnext with plain norms": (lambda: of_timm("convnext_tiny", depths=(1,) * 4, dims=(8, 8, 12, 16)), 16),
    "torchvision's convnext": (torchvisions_convnext, 8),
    "timm's vit": (vit, 9),
    "torchvision's vit": (lambda: VisionTransformer(32, 16, 2, 2, 16, 24, num_classes=5), 2),
}
"""Network -> what makes it, its layers that can be pruned."""


def prepared(make):
    torch.manual_seed(0)
    model = make().eval()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(last.weight)  # torchvision's transformer has zeros there
    scramble(model, IMAGES)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    more = [entry for entry in MORE if any(name.startswith(entry[:-1]) for name in linear)]
    return model, PruningGraph(model, IMAGES, extra_layers=more)


def check_all(model, graph, criteria=("l1", "cosine"), compensate="off"):
    """All candidates of all layers: masked, and their losses are those of copies."""
    config = LaaspConfig(flops_reduction=0.5, criteria=criteria, step=0.05, compensate=compensate)
    macs, calibration = count_macs(model, IMAGES), CalibrationSet(IMAGES, LABELS, 4)
    baseline, made_up, given = measure_baseline(graph, macs, config), not_made_up, {}
    if compensate != "off":
        measured = Measured(capture(model, Plan.empty()))
        compensator = CompensationMemory().at(
            model, graph, compensate, measured, lambda network, readers: grams(model, calibration, readers)
        )
        made_up = compensator.made_up
        given = {"obs": compensator.obs_scores(model, graph, counts_of(graph, macs, baseline, config))}
    tasks = tasks_of(propose(model, graph, macs, baseline, config, given, made_up=made_up))
    model = ready(model, torch.device("cpu"))
    engine = Engine(model, calibration)
    assert [engine.branch_points.cost(task).copied for task in tasks] == [""] * len(tasks)
    found = engine.losses(tasks, np.arange(len(IMAGES)))
    assert not found.errors and len({tuple(row) for row in found.values}) > len(tasks) // 2
    for task, losses in zip(tasks, found.values, strict=True):
        wanted = loss_of_copy(model, task, calibration)
        assert losses.mean(dtype=np.float64) == pytest.approx(wanted, rel=1e-5), task.name
    return tasks


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("compensate", ["off", "full"])
def test_all_candidates_are_masked_and_exact(name, compensate):
    make, prunable = NETWORKS[name]
    model, graph = prepared(make)
    assert len(graph.layers) == prunable
    if compensate == "off":
        check_all(model, graph)
    else:
        tasks = check_all(model, graph, ("l1", "obs"), compensate)
        assert any(task.made_up for task in tasks)


def test_the_last_of_several_prunes_may_be_of_heads_and_takes_those_of_the_lowest_mean():
    model, _ = prepared(vit)
    settings = {"extra_layers": ("blocks.*",), "ignored": ("patch_embed",)}
    config = LaaspConfig(flops_reduction=0.055, step=0.05, criteria=("l1",), prunes_per_iteration=2, **settings)
    heads, first = "blocks.1.attn.qkv", "blocks.0.mlp.fc1"
    executor = Scripted({(first, "l1"): 0.5, (heads, "l1"): 0.6})
    graph = PruningGraph(model, IMAGES, extra_layers=config.extra_layers, ignored=config.ignored)
    baseline = measure_baseline(graph, count_macs(model, IMAGES[:1]), config)
    context = dataclasses.replace(first_standing(model, IMAGES[:1], config, executor), baseline=baseline)
    mlp, attention = Laasp().iterate(context).decision.prunes
    assert (mlp.layer, attention.layer) == (first, heads)
    norms = model.get_submodule(heads).weight.detach().flatten(1).abs().sum(1)
    means = [float(norms[list(rows)].mean()) for rows in graph.layers[heads].heads]
    assert attention.filters == (means.index(min(means)),)


def test_the_layers_of_a_vision_transformer():
    _, graph = prepared(vit)
    block = [
        f"blocks.{block}.{layer}" for block in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert list(graph.layers) == ["patch_embed.proj", *block]
    assert graph.layers["blocks.0.mlp.fc1"].filters == 64 and graph.layers["patch_embed.proj"].filters == 16
    heads = graph.layers["blocks.0.attn.qkv"]
    assert (heads.filters, heads.blocks) == (4, 1)
    # Head 1 has the channels 4 to 7 of the queries, of the keys (from 16) and of the values (from 32).
    assert heads.heads[1] == (4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39)


def test_heads_are_cut_from_rows_columns_and_numbers():
    model, graph = prepared(vit)
    step = graph.step("blocks.1.attn.qkv", [0, 2])
    kept = (4, 5, 6, 7, 12, 13, 14, 15)
    assert step.tensors["blocks.1.attn.proj.weight"] == {1: (kept,)}
    rows = tuple(16 * part + index for part in range(3) for index in kept)
    assert step.tensors["blocks.1.attn.qkv.weight"] == {0: (rows,)} == {0: step.tensors["blocks.1.attn.qkv.bias"][0]}
    assert step.attributes["blocks.1.attn"] == {"num_heads": 2, "attn_dim": 8}
    again = Plan.from_json(step.to_json())
    pruned, other = clone_sharing_parameters(model), clone_sharing_parameters(model)
    apply_plan(pruned, step)
    apply_plan(other, again)
    # By hand: zero the columns of `proj` that read the heads, and nothing of them is left.
    weight = model.blocks[1].attn.proj.weight.detach().clone()
    weight[:, [index for index in range(16) if index not in kept]] = 0
    model.blocks[1].attn.proj.weight.data = weight
    with torch.inference_mode():
        torch.testing.assert_close(pruned(IMAGES), model(IMAGES), rtol=0, atol=1e-5)
        assert torch.equal(pruned(IMAGES), other(IMAGES))
    assert pruned.blocks[1].attn.qkv.out_features == 24 and pruned.blocks[1].attn.num_heads == 2


def test_a_pruned_transformer_is_pruned_again_until_one_head_is_left():
    model, graph = prepared(vit)
    for layer, filters in (("blocks.0.attn.qkv", [1]), ("patch_embed.proj", [0, 5]), ("blocks.0.mlp.fc1", [3])):
        apply_plan(model, graph.step(layer, filters))
        graph = PruningGraph(model, IMAGES, extra_layers=["blocks.*"])
    assert (graph.layers["blocks.0.attn.qkv"].filters, graph.layers["blocks.0.mlp.fc1"].filters) == (3, 63)
    check_all(model, graph, ("l1",))
    apply_plan(model, graph.step("blocks.0.attn.qkv", [0, 2]))
    last = PruningGraph(model, IMAGES, extra_layers=["blocks.*"])
    assert "blocks.0.attn.qkv" in last.skipped and "blocks.1.attn.qkv" in last.layers


def test_a_heads_score_is_the_mean_of_its_rows():
    _, graph = prepared(vit)
    heads = graph.layers["blocks.0.attn.qkv"]
    scores = torch.zeros(48)
    scores[[4, 20, 36]] = torch.tensor([1.0, 2.0, 3.0])
    assert heads.of_filters(scores).tolist() == [0, 0.5, 0, 0]
    assert heads.of_filters(torch.arange(4.0)).tolist() == [0, 1, 2, 3]
    assert graph.layers["blocks.0.mlp.fc1"].of_filters(scores) is scores


def test_ranking_a_transformer():
    model, _ = prepared(vit)
    ranking = rank(model, IMAGES, LABELS, criteria=("l1", "pls"), extra_layers=["blocks.*.qkv", "blocks.*.fc1"])
    assert {entry.layer.rpartition(".")[2] for entry in ranking} == {"proj", "qkv", "fc1"}
    assert all(max(entry.filters) < 4 for entry in ranking if entry.layer.endswith("qkv"))
    assert not any(entry.copied for entry in ranking)


class Norm2d(nn.LayerNorm):
    """A norm over dimension 1, as networks derive it."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Doubled(nn.LayerNorm):
    """A norm that does more than its type does."""

    def forward(self, x):
        return 2 * super().forward(x)


class Between(nn.Module):
    def __init__(self, norm, last):
        super().__init__()
        self.make, self.norm, self.read, self.last = nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 5, 1), last

    def forward(self, x):
        x = self.make(x)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.last else self.norm(x)
        return self.read(x).mean((2, 3))


@pytest.mark.parametrize(
    ("norm", "last", "copied"),
    [
        (nn.LayerNorm(8), True, ""),
        (nn.LayerNorm(8, elementwise_affine=False), True, ""),
        (Norm2d(8), False, ""),
        (nn.GroupNorm(1, 8), False, ""),
        (nn.GroupNorm(2, 8), False, ""),
        (nn.GroupNorm(4, 8, affine=False), False, ""),
        (Doubled(8), True, "norm normalises over its channels, and does more than its type does"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_masked_norm_counts_the_channels_that_are_left(norm, last, copied):
    torch.manual_seed(0)
    model = Between(norm, last).eval()
    scramble(model, IMAGES)
    model.make.weight.data[0] = 100  # a channel that changes the statistics much
    graph, macs = PruningGraph(model, IMAGES), count_macs(model, IMAGES)
    config = LaaspConfig(flops_reduction=0.5, criteria=("l1", "l2", "cosine"), step=0.3)
    tasks = tasks_of(propose(model, graph, macs, measure_baseline(graph, macs, config), config))
    calibration = CalibrationSet(IMAGES, LABELS, 4)
    engine = Engine(model, calibration)
    assert {engine.branch_points.cost(task).copied for task in tasks[:-1]} == {copied}
    found = engine.losses(tasks, np.arange(4))
    for task, losses in zip(tasks, found.values, strict=True):
        assert losses.mean(dtype=np.float64) == pytest.approx(loss_of_copy(model, task, calibration), rel=1e-5)
