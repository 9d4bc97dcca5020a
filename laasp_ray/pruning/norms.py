"""Which BatchNorm follows a layer directly."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from laasp_ray.pruning.masking import is_bare
from laasp_ray.pruning.structure import traced
from laasp_ray.pruning.verify import clone_sharing_parameters


def norms_after(model: nn.Module) -> dict[str, str]:
    """Layer -> the BatchNorm with running statistics that alone reads its output. Each of the two runs once.

    Empty for a network whose forward pass cannot be traced.
    """
    network = clone_sharing_parameters(model)
    graph = traced(network)
    if graph is None:
        return {}
    modules = dict(network.named_modules())
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    found = {}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        layer, norm = str(before.target), str(node.target)
        module = modules[norm]
        if (
            type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
            and is_bare(module)
            and module.running_mean is not None
            and calls[layer] == calls[norm] == len(before.users) == 1
        ):
            found[layer] = norm
    return found
