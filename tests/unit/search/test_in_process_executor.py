"""The executor of one process: a network is traced once for all that is measured on it, and another one anew."""

import torch
from torch import nn

from laasp_ray.config import SearchConfig
from laasp_ray.pruning.network import capture
from laasp_ray.pruning.plan import Plan
from laasp_ray.search import executor as of_process
from laasp_ray.search.evaluate import CalibrationSet, LossTask
from laasp_ray.search.executor import InProcessExecutor

CPU = torch.device("cpu")


def losses(executor, network, images=None):
    task = LossTask("as it stands", Plan.empty(), {})
    (result,) = executor.measure(network, [task], lambda *_: None, lambda share: None, images=images)
    return result.loss


def test_an_engine_is_made_once_for_a_network(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    calibration = CalibrationSet(torch.randn(6, 3, 8, 8), torch.arange(6) % 4, 2)
    made, engine = [], of_process.Engine
    monkeypatch.setattr(of_process, "Engine", lambda *given, **named: made.append(1) or engine(*given, **named))
    executor = InProcessExecutor(model, calibration, CPU, SearchConfig(), 0)
    first = capture(model, Plan.empty())
    before = losses(executor, first)
    assert losses(executor, first, images=6) == before and len(made) == 1
    with torch.no_grad():
        model[0].weight *= 3
    second = capture(model, Plan.empty())  # of equal shapes and plan, with other weights
    after = losses(executor, second)
    assert after != before and len(made) == 2
    fresh = InProcessExecutor(model, calibration, CPU, SearchConfig(), 0)
    assert losses(fresh, second) == after
