"""300 networks drawn at random, 100 of them by default and the others `exhaustive`.

Every layer is prunable or refused with a reason, and a candidate's loss is its cut network's.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from random_networks import IMAGES, RandomNetwork
from torch.nn import functional

from laasp_ray.config import LaaspConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.plan import apply_plan
from laasp_ray.pruning.verify import clone_sharing_parameters, scramble
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.engine import Engine
from laasp_ray.search.evaluate import CalibrationSet, ready

CHUNKS, NETWORKS, BY_DEFAULT = 15, 300, 5
LABELS = torch.arange(len(IMAGES)) % 5
MOST_BYTES = 2_000_000_000
"""The most memory that the networks of a chunk need together, beside what the process had before them."""


def memory(key):
    """Bytes of this process: VmRSS, what it has now; VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


@torch.inference_mode()
def losses_of_copy(model, task, images=IMAGES, labels=LABELS):
    pruned = clone_sharing_parameters(model)
    apply_plan(pruned, task.step)
    return functional.cross_entropy(pruned(images), labels, reduction="none").numpy()


def checked(seed):
    """How many layers can be pruned, and how many candidates were masked."""
    torch.set_num_threads(1)
    model = RandomNetwork(seed).eval()
    scramble(model, IMAGES)
    graph = PruningGraph(model, IMAGES)
    assert all(graph.skipped.values())
    if not graph.layers:
        return 0, 0
    macs = count_macs(model, IMAGES)
    config = LaaspConfig(flops_reduction=0.5, criteria=("l1", "cosine"), step=0.05)
    tasks = tasks_of(propose(model, graph, macs, measure_baseline(graph, macs, config), config))
    engine = Engine(ready(model, torch.device("cpu")), CalibrationSet(IMAGES, LABELS, 4))
    found = engine.losses(tasks, np.arange(len(IMAGES)))
    assert not found.errors
    masked = 0
    for task, losses in zip(tasks[:-1], found.values, strict=False):
        np.testing.assert_allclose(losses, losses_of_copy(model, task), rtol=1e-4, atol=2e-5, err_msg=task.name)
        masked += not engine.branch_points.cost(task).copied
    return len(graph.layers), masked


@pytest.mark.parametrize(
    "chunk",
    [pytest.param(chunk, marks=pytest.mark.exhaustive if chunk >= BY_DEFAULT else ()) for chunk in range(CHUNKS)],
)
def test_every_candidate_of_random_networks(chunk):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = memory("VmRSS")
    counts = [checked(seed) for seed in range(chunk, NETWORKS, CHUNKS)]
    layers, masked = np.sum(counts, axis=0)
    assert layers > 40
    assert masked > 20  # or the comparison would be of copies with copies
    assert memory("VmHWM") - before < MOST_BYTES
