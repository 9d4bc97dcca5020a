"""AAP, accelerator-aware pruning: groups of weights that are fetched together lose the same number each.

Source: Kang, IEEE TCSVT 30(7) 2020 (arXiv 1804.09862); pruning/sparsity/groups.py says what of it is our reading. The
number pruned rises in stages; a stage's masks come from the weights as they stand and hold in the training after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from laasp_ray.config import SparsityConfig
from laasp_ray.errors import ConfigError
from laasp_ray.pruning.network import NetworkState
from laasp_ray.pruning.sparsity.groups import GroupRule, group_mask, masked, pack_mask, sort_layers, unpack_mask


@dataclass(frozen=True)
class LayerRules:
    """`rules`: sparse layer -> its rule, in network order; `dense`: convolution or linear layer -> why it has none."""

    rules: Mapping[str, GroupRule]
    dense: Mapping[str, str]


@dataclass(frozen=True)
class Stage:
    """What a stage leaves: the network with its zeros, and the masks (parameter -> packed) that keep them."""

    layers: LayerRules
    masks: Mapping[str, bytes]
    network: NetworkState


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


def take_stage(
    model: nn.Module,
    network: NetworkState,
    config: SparsityConfig,
    ignored: tuple[str, ...],
    held: Mapping[str, bytes],
    *,
    number: int,
) -> Stage:
    """Stage `number` (from 1); `model` is `network` rebuilt, and is not changed. What `held` prunes stays pruned."""
    layers = layer_rules(model, config, ignored, config.all_stages[number - 1])
    masks = {}
    for layer, rule in layers.rules.items():
        name = f"{layer}.weight"
        weight = network.tensors[name]
        before = unpack_mask(held[name], weight.shape) if name in held else None
        masks[name] = pack_mask(group_mask(weight, rule, before))
    return Stage(layers, masks, NetworkState(network.plan, masked(network.tensors, masks)))
