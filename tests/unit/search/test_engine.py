"""The engine: the same losses however the work is cut, within the memory allowed, and failures that stop nobody."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import randomise_batchnorm
from plain_losses import loss_of_copy
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from laasp_ray.config import DEFAULT_CRITERIA, LaaspConfig, ModelConfig
from laasp_ray.cost.macs import count_macs
from laasp_ray.errors import SearchError
from laasp_ray.models import build
from laasp_ray.pruning.graph import PruningGraph
from laasp_ray.pruning.masking import CannotMask
from laasp_ray.pruning.plan import Plan
from laasp_ray.search.candidates import measure_baseline, propose, tasks_of
from laasp_ray.search.engine import Cost, Engine
from laasp_ray.search.evaluate import CalibrationSet, LossTask, ready
from laasp_ray.search.program import BranchPoint

IMAGES = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ALL = np.arange(len(IMAGES))
UNPRUNED = LossTask("as it stands", Plan.empty(), {})


class Scaled(nn.GroupNorm):
    """A norm over its channels that does more than its type does, so that it is not masked."""

    def forward(self, x):
        return 2 * super().forward(x)


class Small(nn.Module):
    """Two branches from one stem, a strided one and a grouped one, that meet again; `norm` rules masks out for `last`.

    At 16 x 16: stem 8 x 256 positions, the others at 64.
    """

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.right, self.grouped = nn.Conv2d(8, 12, 1, stride=2), nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.last, self.norm = nn.Conv2d(12, 6, 1), Scaled(2, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = self.left(x).relu() + self.grouped(self.right(x).relu())
        return self.head(self.norm(self.last(x)).mean((2, 3)))


class Normed(Small):
    """The same with a norm that is masked."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)


def made(kind):
    torch.manual_seed(0)
    return ready(randomise_batchnorm(kind()), torch.device("cpu"))


def small():
    return made(Small)


def all_tasks(model, criteria=DEFAULT_CRITERIA, step=0.05):
    graph, macs = PruningGraph(model, IMAGES), count_macs(model, IMAGES)
    config = LaaspConfig(flops_reduction=0.5, criteria=criteria, step=step)
    return tasks_of(propose(model, graph, macs, measure_baseline(graph, macs, config), config))


def subset_of(batch_size):
    return CalibrationSet(IMAGES, torch.arange(7) % 5, batch_size)


def least_memory(model, calibration, tasks):
    """The bytes that an image needs for these tasks: those of the unchanged network, and of one branch."""
    engine = Engine(model, calibration)
    branch_points = [
        engine.branch_points.find(task)
        for task in tasks
        if isinstance(engine.branch_points.find(task), BranchPoint) and not task.unpruned
    ]
    engine.losses(tasks, np.arange(1))
    base, branch = engine._program.peak_bytes(branch_points, whole=UNPRUNED in tasks)
    return max(base, engine._copy_bytes), branch


def expected(model, tasks, calibration):
    return [loss_of_copy(model, task, calibration) for task in tasks]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batches_do_not_change_the_losses(batch_size):
    model = small()
    tasks, calibration = all_tasks(model), subset_of(batch_size)
    engine = Engine(model, calibration)
    assert {bool(engine.branch_points.cost(task).copied) for task in tasks} == {True, False}
    found = engine.losses(tasks, ALL)
    assert (found.values.shape, found.values.dtype) == ((len(tasks), 7), np.float32)
    assert found.values.mean(1, dtype=np.float64) == pytest.approx(expected(model, tasks, calibration), rel=1e-5)
    whole = Engine(model, subset_of(7)).losses(tasks, ALL).values
    np.testing.assert_allclose(found.values, whole, rtol=1e-5, atol=1e-6)


def test_any_tasks_on_any_images_in_any_order():
    model = small()
    tasks, calibration = all_tasks(model), subset_of(2)
    engine = Engine(model, calibration)
    whole = engine.losses(tasks, ALL).values
    order, images = [5, len(tasks) - 1, 0, 3], np.array([6, 0, 3])
    found = engine.losses([tasks[position] for position in order], images)
    np.testing.assert_allclose(found.values, whole[order][:, images], rtol=1e-5, atol=1e-6)
    assert found.seconds > 0


@pytest.mark.parametrize("times", [1, 2.5])
def test_little_memory_does_not_change_the_losses(times):
    model = small()
    tasks, calibration = all_tasks(model), subset_of(7)
    bound = int(times * sum(least_memory(model, calibration, tasks)))
    found = Engine(model, calibration, memory_bytes=bound).losses(tasks, ALL)
    assert found.values.mean(1, dtype=np.float64) == pytest.approx(expected(model, tasks, calibration), rel=1e-5)


def test_too_little_memory_for_one_image_says_how_much_it_takes():
    model = small()
    tasks = all_tasks(model)
    least = sum(least_memory(model, subset_of(7), tasks))
    assert not Engine(model, subset_of(7), memory_bytes=least).losses(tasks, ALL).errors
    with pytest.raises(SearchError, match=rf"one image needs {least / 1e6:.1f} MB .*raise search\.memory_mb"):
        Engine(model, subset_of(7), memory_bytes=least - 1).losses(tasks, ALL)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations give under it, until it is freed; parameters and buffers are left out."""

    def __init__(self, *models):
        super().__init__()
        tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        self._seen = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in _pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _free(self, storage, size):
        self._seen.remove(storage)
        self.now -= size


class Roundabout(Small):
    """Layers that need copies of their inputs: a transposed one, and padding that is not zeros. No prune is copied."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.up, self.wide = nn.ConvTranspose2d(12, 4, 2, stride=2), nn.Conv2d(4, 24, 3, 1, 1, padding_mode="reflect")
        self.end, self.norm = nn.Conv2d(24, 12, 1), nn.Identity()

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = self.left(x).relu() + self.grouped(self.right(x).relu())
        x = self.end(self.wide(self.up(x).relu()).relu())
        return self.head(self.norm(self.last(x)).mean((2, 3)))


class Long(nn.Sequential):
    """Twelve equal layers: whoever keeps their values needs many times what a pass takes."""

    def __init__(self):
        between = (nn.Conv2d(6, 6, 1) for _ in range(12))
        super().__init__(nn.Conv2d(3, 6, 1), *between, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


@pytest.mark.parametrize("copied", [False, True], ids=["branches", "copies"])
@pytest.mark.parametrize("joint", [1, 3])
@pytest.mark.parametrize("kind", [Small, Normed, Roundabout, Long])
def test_the_memory_bound_is_honoured(kind, joint, copied, monkeypatch):
    """Of what is alive at a time, two chunks' images (this and the one before) and two layers' weights are allowed."""
    model, images = made(kind), torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    calibration = CalibrationSet(images, torch.arange(5) % 5, 5)
    tasks = all_tasks(model, ("l1",))
    if copied:
        tasks = [replace(task, mask=CannotMask("none is wanted")) for task in tasks[:-1]]
    else:
        found = Engine(model, calibration).branch_points
        tasks = [task for task in tasks if not isinstance(found.find(task), CannotMask)]
    base, branch = least_memory(model, calibration, tasks)
    bound = base + joint * branch
    if joint > 1:
        monkeypatch.setattr(Engine, "_sizes", lambda *_, **__: (1, joint))
    for memory in (bound, *([int(2.5 * bound)] if joint == 1 else [])):
        engine = Engine(model, calibration, memory_bytes=memory)
        with LiveBytes(model, *engine._program._modules.values()) as live:
            assert not engine.losses(tasks, np.arange(5)).errors
        size = engine._copy_size(5) if copied else memory // bound
        weights = max(parameter.numel() for parameter in model.parameters())
        allowed = 2 * 4 * (size * images[0].numel() + weights)
        assert live.most <= memory + allowed
        assert live.most > memory / 3  # nor is it far too careful
        assert live.now <= 4 * weights


def test_a_network_that_cannot_be_traced_is_bounded_too():
    class ByValue(Roundabout):
        def forward(self, x):
            return super().forward(x if x.mean() < 9 else -x)

    model, images = made(ByValue), torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    calibration = CalibrationSet(images, torch.arange(5) % 5, 5)
    with pytest.raises(SearchError, match=r"raise search\.memory_mb"):
        Engine(model, calibration, memory_bytes=1000).losses([UNPRUNED], ALL[:5])
    memory = 1_000_000  # enough for two images, not for five
    engine = Engine(model, calibration, memory_bytes=memory)
    with LiveBytes(model) as live:
        assert not engine.losses([UNPRUNED], ALL[:5]).errors
    assert memory / 3 < live.most <= memory + 2 * 4 * 2 * images[0].numel()


class Touchy(nn.Conv2d):
    """Refuses inputs whose channel 4 is silent, and those whose channel 5 is, if they are bright."""

    def forward(self, x):
        if not x[:, 4].any():
            raise ValueError("channel 4 is silent\nas it should not be")
        if not x[:, 5].any() and (x[:, 0].amax((1, 2)) > 5).any():
            raise ValueError("channel 5 is silent")
        return super().forward(x)


def touchy():
    model = small()
    model.left = Touchy(8, 12, 3, stride=2, padding=1)
    with torch.no_grad():
        model.stem.weight[0], model.stem.bias[0] = 0, 0
        model.bn.bias[0] = 1
        model.stem.weight[0, 0, 1, 1] = 1
    return ready(model, torch.device("cpu"))


def silence(*channels):
    """A task that is never cut: a mask alone."""
    return LossTask(f"without {channels}", Plan(layers={"stem": (0,)}), {"left": channels})


@pytest.mark.parametrize("joint", [1, 3, 8])
def test_a_candidate_that_raises_has_no_losses_and_stops_nobody(joint, monkeypatch):
    monkeypatch.setattr(Engine, "_sizes", lambda *_, **__: (2, joint))
    model, images = touchy(), IMAGES.clone()
    images[3, 0] = 50.0  # the only bright one
    engine = Engine(model, CalibrationSet(images, torch.arange(7) % 5, 2))
    broken = LossTask("broken", Plan(tensors={"stem.weight": {0: ((0, 99),)}}), "no mask")
    alive = [silence(1), silence(2, 3), silence(6), UNPRUNED]
    wanted = engine.losses(alive, ALL).values
    found = engine.losses([silence(4), alive[0], broken, alive[1], silence(5), alive[2], alive[3]], ALL)
    assert set(found.errors) == {0, 2, 4}
    assert found.errors[0] == "ValueError: channel 4 is silent"
    assert found.errors[2].startswith("PruningError: stem.weight, axis 0: the plan keeps index 99")
    assert found.errors[4] == "ValueError: channel 5 is silent"
    assert np.isnan(found.values[[0, 2, 4]]).all()
    np.testing.assert_allclose(found.values[[1, 3, 5, 6]], wanted, rtol=1e-5)
    assert np.isfinite(wanted).all()


def test_what_a_failed_branch_held_is_let_go():
    engine = Engine(touchy(), subset_of(7))
    program, task = engine._program, silence(4)
    [(_, _, outcome)] = program.run(IMAGES, {engine.branch_points.find(task): [[task.mask]]}, whole=False)
    assert isinstance(outcome, ValueError)
    assert outcome.__traceback__ is None


def test_a_network_that_fails_itself_is_no_candidates_fault():
    model = touchy()
    engine = Engine(model, subset_of(7))
    with torch.no_grad():
        model.bn.weight[4], model.bn.bias[4] = 0, 0
    with pytest.raises(ValueError, match="channel 4"):
        Engine(model, subset_of(7)).losses([silence(1), UNPRUNED], ALL)
    assert not engine.losses([silence(1), UNPRUNED], ALL).errors  # whose program was made before


@pytest.mark.parametrize(
    ("builder", "joint"),
    [("small", 2), ("small", 3), ("small", 100), ("cifar.resnet20", 3), ("torchvision.mobilenet_v2", 2)],
)
def test_branches_in_batches_are_as_one_by_one(builder, joint, monkeypatch):
    if builder == "small":
        model = small()
    else:
        torch.manual_seed(0)
        model = randomise_batchnorm(build(ModelConfig(builder=builder, arguments={"num_classes": 10})))
        model = ready(model, torch.device("cpu"))
    tasks = all_tasks(model)[::5]
    engine = Engine(model, subset_of(3))
    one_by_one = engine.losses(tasks, ALL)
    monkeypatch.setattr(Engine, "_sizes", lambda *_, **__: (3, joint))
    batches = engine.losses(tasks, ALL)
    assert not batches.errors
    np.testing.assert_allclose(batches.values, one_by_one.values, rtol=1e-5, atol=1e-6)


def test_costs_by_hand():
    model = small()
    calibration = subset_of(7)
    branch_points = Engine(model, calibration).branch_points
    stem, left, right = 8 * 27 * 256, 12 * 72 * 64, 12 * 8 * 64
    grouped, last, head = 12 * 36 * 64, 6 * 12 * 64, 6 * 5
    whole = stem + left + right + grouped + last + head
    assert whole == count_macs(model, IMAGES).total
    costs = {task.name.split()[0]: branch_points.cost(task) for task in all_tasks(model, ("l1",))[:-1]}
    # read by left and right, of which right is computed last
    assert costs["stem"] == Cost(stem + left + right, left + right + grouped + last + head)
    assert costs["right"] == Cost(stem + left + right + grouped, grouped + last + head)
    assert costs["left"] == costs["grouped"] == Cost(whole - head, last + head)
    assert costs["last"] == Cost(0, whole, "norm normalises over its channels, and does more than its type does")
    assert branch_points.cost(UNPRUNED) == Cost(0, whole)


def test_costs_where_nothing_is_known_are_all_the_same():
    class ByValue(Small):
        def forward(self, x):
            return super().forward(x if x.mean() < 9 else -x)

    branch_points = Engine(made(ByValue), subset_of(7)).branch_points
    cost = branch_points.cost(silence(1))
    assert (cost.shared, cost.own) == (0, 1)
    assert cost.copied.startswith("its forward pass cannot be traced")
    assert branch_points.cost(UNPRUNED) == Cost(0, 1)
