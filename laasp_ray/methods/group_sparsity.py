"""AAP, accelerator-aware pruning: groups of weights that are fetched together lose the same number each.

Source: Kang, IEEE TCSVT 30(7) 2020 (arXiv 1804.09862); pruning/sparsity/groups.py says what of it is our reading. The
number pruned rises in stages; a stage's masks come from the weights as they stand and hold in the training after it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from laasp_ray.config import SparsityConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.errors import ConfigError
from laasp_ray.methods.base import FinishedNetwork, IterationContext, IterationResult, MethodReport, PruningMethod
from laasp_ray.methods.sparsity_report import measure_sparsity, sparsity_to_json
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.sparsity.groups import GroupRule, group_mask, masked, pack_mask, sort_layers, unpack_mask

REPORT = "sparsity.json"
"""The report by layer, in the run's folder."""


@dataclass(frozen=True)
class LayerRules:
    """`rules`: sparse layer -> its rule, in network order; `dense`: convolution or linear layer -> why it has none."""

    rules: Mapping[str, GroupRule]
    dense: Mapping[str, str]


def layer_rules(model: nn.Module, config: SparsityConfig, ignored: tuple[str, ...], pruned: int) -> LayerRules:
    """The rules of the stage in which convolutions lose `pruned` of every group.

    Linear layers lose their `fc_prune` x `pruned` / `prune`, rounded down; one that loses none yet has no rule and no
    reason. Raises ConfigError if `fc_prune` or `ignored` does not fit the network, or no layer can be sparse.
    """
    order = [name for name, _ in model.named_modules()]
    layers = sort_layers(model, config.group, ignored)
    rules = {name: GroupRule(config.group, pruned) for name in layers.convolutions}
    dense = dict(layers.dense)
    if config.fc_prune:
        if len(config.fc_prune) not in (1, len(layers.linear)) or not layers.linear:
            raise ConfigError(
                f"sparsity.fc_prune is {config.fc_prune!r}, the network has {len(layers.linear)} linear layers with "
                f"groups of {config.group} ({', '.join(layers.linear)}): give one number for all or one for each"
            )
        shares = config.fc_prune * (len(layers.linear) if len(config.fc_prune) == 1 else 1)
        for name, share in zip(layers.linear, shares, strict=True):
            if share * pruned >= config.prune:
                rules[name] = GroupRule(config.group, share * pruned // config.prune)
    else:
        dense |= dict.fromkeys(layers.linear, "linear, and sparsity.fc_prune is not given")
    if not rules and pruned == config.prune:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:3])
        raise ConfigError(f"no layer of the network can be sparse in groups of {config.group} ({reasons})")
    return LayerRules(
        {name: rules[name] for name in order if name in rules}, {name: dense[name] for name in order if name in dense}
    )


class GroupSparsity(PruningMethod):
    """An iteration is a stage; what an earlier stage pruned stays pruned."""

    measures_losses = False

    def __init__(self, config: SparsityConfig, ignored: tuple[str, ...], seed: int) -> None:
        """`ignored` are the run's modules that stay dense; `seed` draws what the report compares with."""
        self._config, self._ignored, self._seed = config, ignored, seed

    def title(self, number: int) -> str:
        return f"stage {number}: {self._config.all_stages[number - 1]} of every {self._config.group}"

    def iterate(self, context: IterationContext) -> IterationResult:
        stages, network = self._config.all_stages, context.network
        layers = layer_rules(context.model, self._config, self._ignored, stages[context.iteration - 1])
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
                "group": self._config.group,
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
        model = finished.model
        layers = layer_rules(model, self._config, self._ignored, self._config.prune)
        macs = count_macs(model, finished.example_input).per_layer
        rows = measure_sparsity(model, layers.rules, layers.dense, finished.masks, macs, seed=self._seed)
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
