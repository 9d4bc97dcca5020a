"""AAP, accelerator-aware pruning: every group of weights that is fetched together loses the same number of weights.

Source: Kang, IEEE TCSVT 30(7) 2020 (arXiv 1804.09862); pruning/sparsity/groups.py lists what is our interpretation. The
number pruned rises in stages. Each stage computes its masks from the current weights and keeps them in the training
after it.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from laasp_ray.config import GroupSparsityConfig, RunConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.errors import ConfigError
from laasp_ray.methods.base import FinishedNetwork, IterationContext, IterationResult, MethodReport, PruningMethod
from laasp_ray.methods.estimate import Estimate, Rows
from laasp_ray.methods.preparation import Preparation, UnprunedNetwork, plain_baseline, section_of
from laasp_ray.methods.sparsity_report import measure_sparsity, sparsity_to_json
from laasp_ray.models.copying import deep_copy
from laasp_ray.pruning.network import NetworkState, capture, rebuild
from laasp_ray.pruning.sparsity.groups import GroupRule, group_mask, masked, pack_mask, sort_layers, unpack_mask
from laasp_ray.store.addresses import public
from laasp_ray.store.artifact import Arch, load_pruned, read_arch
from laasp_ray.store.checkpoint import UNPRUNED, load_checkpoint
from laasp_ray.store.storage import Storage
from laasp_ray.train.check import check_training

REPORT = "sparsity.json"
"""The name of the report by layer in the run's folder."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerRules:
    """`rules`: sparse layer -> its rule, in network order. `dense`: convolution or linear layer -> the reason."""

    rules: Mapping[str, GroupRule]
    dense: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`layers`: number of weights pruned from every group -> number of layers. These layers have `weights` in all, of
    which `kept` are left. `epochs` of training follow the stage.
    """

    layers: Mapping[int, int]
    weights: int
    kept: int
    epochs: int


@dataclass(frozen=True, kw_only=True)
class StagesEstimate(Estimate):
    """`dense`: layer that stays dense -> the reason."""

    stages: tuple[Stage, ...]
    dense: Mapping[str, str]


def layer_rules(model: nn.Module, config: GroupSparsityConfig, pruned: int) -> LayerRules:
    """The rules of the stage that prunes `pruned` weights from every group of a convolution.

    A linear layer loses its `fc_pruned_per_group` x `pruned` / `pruned_per_group`, rounded down. If that is 0 in this
    stage the layer has no rule and no reason. Raises ConfigError if `fc_pruned_per_group` or `ignored` does not fit the
    network, or if no layer can be sparse.
    """
    order = [name for name, _ in model.named_modules()]
    layers = sort_layers(model, config.group, config.ignored)
    rules = {name: GroupRule(config.group, pruned) for name in layers.convolutions}
    dense = dict(layers.dense)
    linear = config.fc_pruned_per_group
    if linear:
        if len(linear) not in (1, len(layers.linear)) or not layers.linear:
            raise ConfigError(
                f"prune.fc_pruned_per_group is {linear!r}, the network has {len(layers.linear)} linear layers with "
                f"groups of {config.group} ({', '.join(layers.linear)}): give one number for all or one for each"
            )
        shares = linear * (len(layers.linear) if len(linear) == 1 else 1)
        for name, share in zip(layers.linear, shares, strict=True):
            if share * pruned >= config.pruned_per_group:
                rules[name] = GroupRule(config.group, share * pruned // config.pruned_per_group)
    else:
        dense |= dict.fromkeys(layers.linear, "linear, and prune.fc_pruned_per_group is not given")
    if not rules and pruned == config.pruned_per_group:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:3])
        raise ConfigError(f"no layer of the network can be sparse in groups of {config.group} ({reasons})")
    return LayerRules(
        {name: rules[name] for name in order if name in rules}, {name: dense[name] for name in order if name in dense}
    )


class GroupSparsity(PruningMethod[GroupSparsityConfig]):
    """Group sparsity: each iteration is a stage. Weights that an earlier stage pruned stay pruned."""

    config_class = GroupSparsityConfig
    measures_losses = False

    def prepare(self, network: UnprunedNetwork) -> Preparation:
        config, section = network.config, section_of(network.config, GroupSparsityConfig)
        begun_with, model = None, network.model
        if section.from_run is not None and not network.started:
            arch, model = _finished_run(config, section.from_run, network.model)
            begun_with = capture(model, arch.plan)
        check_training(model, config.model.input_shape, config.train, None, network.task)
        dense = {} if network.started else layer_rules(model, section, section.pruned_per_group).dense
        for name, reason in dense.items():
            logger.info("layer %s stays dense: %s", name, reason)
        baseline = replace(plain_baseline(network.model, network.example_input), skipped=dense)
        return Preparation(baseline=baseline, begun_with=begun_with)

    def title(self, config: GroupSparsityConfig, number: int) -> str:
        return f"stage {number}: {config.all_stages[number - 1]} of every {config.group}"

    def iterate(self, context: IterationContext[GroupSparsityConfig]) -> IterationResult:
        config, network = context.config, context.network
        stages = config.all_stages
        layers = layer_rules(context.model, config, stages[context.iteration - 1])
        masks = {}
        for layer, rule in layers.rules.items():
            name = f"{layer}.weight"
            weight = network.tensors[name]
            before = unpack_mask(context.masks[name], weight.shape) if name in context.masks else None
            masks[name] = pack_mask(group_mask(weight, rule, before))
        tensors = masked(network.tensors, masks)
        weights = sum(tensors[name].numel() for name in masks)
        zeros = sum(int((tensors[name] == 0).sum()) for name in masks)
        return IterationResult(
            network=NetworkState(network.plan, tensors),
            masks=masks,
            ends_pruning=context.iteration == len(stages),
            details={
                "prune": {layer: rule.pruned_per_group for layer, rule in layers.rules.items()},
                "group": config.group,
                "dense": dict(layers.dense),
                "weights": weights,
                "zeros": zeros,
            },
            text=(
                f"stage {context.iteration} of {len(stages)}: {zeros:,} of the {weights:,} weights of {len(masks)} "
                f"layers are zero; left dense: {len(layers.dense)} layers"
            ),
        )

    def report(self, finished: FinishedNetwork) -> MethodReport:
        model, section = finished.model, section_of(finished.config, GroupSparsityConfig)
        layers = layer_rules(model, section, section.pruned_per_group)
        macs = count_macs(model, finished.example_input).per_layer
        rows = measure_sparsity(model, layers.rules, layers.dense, finished.masks, macs, seed=finished.config.seed)
        return MethodReport(
            details={
                "weights": sum(row.weights for row in rows),
                "weights_kept": sum(row.kept for row in rows),
                "weights_bytes_dense": sum(t.numel() * t.element_size() for t in model.state_dict().values()),
            },
            files={REPORT: json.dumps(sparsity_to_json(rows), indent=1).encode()},
        )

    def result(self, details: Mapping[str, Any]) -> str:
        return (
            f"{details['weights_kept'] / details['weights']:.2%} of all weights of convolutions and linear layers "
            f"left, {details['weights_bytes']:,} bytes on disk for {details['weights_bytes_dense']:,}"
        )

    def estimate(self, network: UnprunedNetwork, prepared: Preparation, calibration_images: int) -> StagesEstimate:
        config, section = network.config, section_of(network.config, GroupSparsityConfig)
        model = network.model if prepared.begun_with is None else rebuild(network.model, prepared.begun_with)
        *earlier, _ = section.all_stages
        following = [*(section.fine_tune_epochs for _ in earlier), config.train.epochs - config.train.prune_epoch]
        stages = []
        for pruned, epochs in zip(section.all_stages, following, strict=True):
            layers = layer_rules(model, section, pruned)
            shapes = {layer: model.get_parameter(f"{layer}.weight").shape for layer in layers.rules}
            stages.append(
                Stage(
                    layers=Counter(rule.pruned_per_group for rule in layers.rules.values()),
                    weights=sum(shape.numel() for shape in shapes.values()),
                    kept=sum(rule.kept_in(shapes[layer]) for layer, rule in layers.rules.items()),
                    epochs=epochs,
                )
            )
        return StagesEstimate(
            iterations=len(stages),
            fine_tunes=len(earlier),
            rows=_rows(section, stages, layers.dense),
            assumptions=("making and holding the masks takes no time",),
            stages=tuple(stages),
            dense=layers.dense,
        )


def _finished_run(config: RunConfig, folder: str, unpruned: nn.Module) -> tuple[Arch, nn.Module]:
    arch = read_arch(folder)
    if arch.model_config != config.model:
        raise ConfigError(
            f"prune.from_run {public(folder)} has the network {arch.model_config}, this run {config.model}: choose "
            "the recipe that made it, or set model.* to match"
        )
    load_checkpoint(Storage.open(folder), UNPRUNED)  # raises early if it is missing: the final comparison needs it
    return arch, load_pruned(folder, deep_copy(unpruned))


def _rows(config: GroupSparsityConfig, stages: Sequence[Stage], dense: Mapping[str, str]) -> Rows:
    rows = []
    for number, stage in enumerate(stages, 1):
        counts = sorted(stage.layers.items())
        layers = ", ".join(f"{pruned} of {config.group} in {count} layers" for pruned, count in counts)
        stay = f"{stage.kept:,} of {stage.weights:,} weights stay; then {stage.epochs} epochs"
        rows.append((f"stage {number}", f"{layers or 'nothing yet'}: {stay}"))
    reasons: dict[str, list[str]] = {}
    for layer, reason in dense.items():
        reasons.setdefault(reason, []).append(layer)
    return (*rows, *(("left dense", f"{', '.join(names)}: {reason}") for reason, names in reasons.items()))
