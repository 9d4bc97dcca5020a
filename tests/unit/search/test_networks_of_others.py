"""Networks that nobody here wrote, torchvision's and timm's: how many layers can be pruned, and their losses.

A few by default, all under the marker `exhaustive`.
"""

import numpy as np
import pytest
import torch
from test_random_networks import losses_of_copy
from torch import nn

from laasp_ray.config import LaaspConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.verify import scramble
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, ready_with

# library, network, side of its images, layers that can be pruned, convolutions
NETWORKS = [
    ("tv", "alexnet", 64, 5, 5),
    ("tv", "vgg11_bn", 32, 8, 8),
    ("tv", "resnet18", 32, 20, 20),
    ("tv", "resnet34", 32, 36, 36),
    ("tv", "resnet50", 32, 53, 53),
    ("tv", "wide_resnet50_2", 32, 53, 53),
    ("tv", "resnext50_32x4d", 32, 53, 53),
    ("tv", "densenet121", 32, 120, 120),
    ("tv", "googlenet", 32, 57, 59),
    ("tv", "inception_v3", 96, 94, 96),
    ("tv", "squeezenet1_0", 64, 25, 26),
    ("tv", "mobilenet_v2", 32, 52, 52),
    ("tv", "mobilenet_v3_small", 32, 52, 52),
    ("tv", "mobilenet_v3_large", 32, 62, 62),
    ("tv", "mnasnet1_0", 32, 52, 52),
    ("tv", "efficientnet_b0", 32, 81, 81),
    ("tv", "efficientnet_v2_s", 32, 170, 170),
    ("tv", "regnet_y_400mf", 32, 85, 85),
    ("tv", "regnet_x_400mf", 32, 71, 71),
    ("tv", "shufflenet_v2_x1_0", 32, 35, 56),
    ("tv", "convnext_tiny", 32, 22, 22),
    ("timm", "rexnet_100", 32, 60, 75),
    ("timm", "resnest14d", 32, 19, 27),
    ("timm", "mixnet_s", 32, 19, 123),
    ("timm", "nfnet_f0", 64, 81, 81),
    ("timm", "dm_nfnet_f0", 64, 81, 81),
    ("timm", "res2net50_26w_4s", 32, 45, 85),
    ("timm", "ecaresnet26t", 32, 19, 39),
    ("timm", "seresnet18", 32, 36, 36),
    ("timm", "darknet53", 32, 52, 52),
    ("timm", "dla34", 32, 37, 38),
    ("timm", "dpn68", 32, 45, 72),
    ("timm", "hrnet_w18_small", 64, 91, 91),
    ("timm", "ghostnet_100", 32, 73, 95),
    ("timm", "efficientnet_lite0", 32, 49, 49),
    ("timm", "mobilenetv3_small_100", 32, 53, 53),
    ("timm", "convnextv2_atto", 64, 40, 40),
    ("timm", "regnetx_002", 32, 44, 44),
    ("timm", "repvgg_a0", 64, 44, 44),
    ("timm", "resnetv2_50", 64, 53, 54),
    ("timm", "selecsls42b", 64, 41, 41),
    ("timm", "skresnet18", 32, 24, 44),
    ("timm", "vovnet39a", 64, 39, 39),
    ("timm", "xception41", 64, 84, 84),
    ("timm", "resnet26d", 32, 31, 31),
    ("timm", "lcnet_050", 32, 32, 32),
    ("timm", "tinynet_e", 32, 51, 51),
    ("timm", "fbnetc_100", 32, 65, 65),
    ("timm", "hardcorenas_a", 32, 51, 51),
    ("timm", "edgenext_xx_small", 64, 3, 20),
    ("timm", "cs3darknet_s", 64, 19, 32),
    ("timm", "gernet_s", 64, 45, 45),
]
FEW = ("mobilenet_v3_small", "shufflenet_v2_x1_0", "resnest14d", "convnextv2_atto")
SPREAD = 6


def built(library, name):
    torch.manual_seed(0)
    if library == "timm":
        return pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=10).eval()
    import torchvision

    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **more).eval()


def check(library, name, side, prunable, convolutions, spread):
    torch.set_num_threads(1)
    model = built(library, name)
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    scramble(model, images)
    graph = PruningGraph(model, images)
    assert sum(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules()) == convolutions
    assert (len(graph.layers), len(graph.skipped)) == (prunable, convolutions - prunable)
    assert all(graph.skipped.values())
    macs, config = count_macs(model, images), LaaspConfig(flops_reduction=0.5, criteria=("l1",))
    tasks = tasks_of(propose(model, graph, macs, measure_baseline(graph, macs, config), config))[:-1]
    if spread is not None:
        tasks = [tasks[position] for position in np.unique(np.linspace(0, len(tasks) - 1, spread).round().astype(int))]
    labels = torch.arange(len(images))
    model, calibration = ready_with(model, CalibrationSet(images, labels, len(images)))
    found = Engine(model, calibration).losses(tasks, np.arange(len(images)))
    assert not found.errors
    for task, losses in zip(tasks, found.values, strict=True):
        np.testing.assert_allclose(
            losses, losses_of_copy(model, task, images, labels), rtol=1e-3, atol=1e-4, err_msg=task.name
        )


@pytest.mark.parametrize("row", [row for row in NETWORKS if row[1] in FEW], ids=lambda row: row[1])
def test_a_few_networks(row):
    check(*row, SPREAD)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("row", NETWORKS, ids=lambda row: row[1])
def test_every_network(row):
    check(*row, None)
