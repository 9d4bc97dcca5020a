"""What the tests of this folder share: networks with telling weights, and prunes worked out another way."""

import copy
import random

import torch
from torch import nn

from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.plan import Plan, apply_plan


def randomise(model, example=None, seed=0):
    """Random affine values, statistics, biases and layer scales: on a new network many prunes change nothing.

    With `example`, statistics are near those that it has there, so that deep networks do not fall silent.
    """
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator) * 0.2
            if name.endswith(("layer_scale", "running_var")) or (tensor.dim() == 1 and name.endswith("weight")):
                tensor.copy_(1 + noise.clamp(-0.8, 0.8))
            elif tensor.dim() == 1:
                tensor.copy_(noise)
        if example is not None:
            norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
            hooks = [norm.register_forward_pre_hook(use_scale_of_input) for norm in norms]
            model(example)
            for hook in hooks:
                hook.remove()
    return model


def use_scale_of_input(norm, inputs):
    norm.running_mean += inputs[0].mean()
    norm.running_var *= inputs[0].var()


def some_filters(group, share=0.34, seed=0):
    """A random share of a layer's filters, as many from each of its blocks, at least one and not all."""
    width, draw = group.filters // group.blocks, random.Random(f"{group.layer}{seed}")
    count = min(max(1, round(share * width)), width - 1)
    return sorted(block * width + index for block in range(group.blocks) for index in draw.sample(range(width), count))


def pruned_copy(model, plan):
    result = copy.deepcopy(model)
    apply_plan(result, plan)
    return result


def with_zeroed_producers(model, plan):
    """The network at full width, but whatever makes a removed channel makes zeros: weights, biases, affine values.

    Equals the pruned network where zeros stay zeros up to the consumers, and nothing normalises over channels.
    """
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, axes in plan.tensors.items():
            tensor = result.state_dict()[name]
            module = result.get_submodule(name.rpartition(".")[0])
            axis = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) and name.endswith("weight") else 0
            if axis in axes and not name.endswith(("running_mean", "running_var")):
                assert axis == 0 or module.groups == 1
                gone = sorted(set(range(tensor.shape[axis])) - set(axes[axis][0]))
                tensor.index_fill_(axis, torch.tensor(gone, dtype=torch.long), 0)
    return result


def prune_by_iterations(model, example, layers, iterations):
    """Prunes in place, a fresh graph each iteration; gives the composed plan."""
    plan = Plan()
    for iteration in range(iterations):
        graph = PruningGraph(model, example)
        layer = layers[iteration % len(layers)]
        step = graph.step(layer, some_filters(graph.layers[layer], share=0.2, seed=iteration))
        apply_plan(model, step)
        plan = plan.then(step)
    return plan
