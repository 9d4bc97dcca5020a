"""What training does on a GPU, as far as a CPU shows it: steps do not wait, kernels are for the sizes there are."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_by_hand import CONFIG, FakeData, linear, train, training_phase

ROWS = [[1.0, 2.0], [0.5, -1.0]]


class Reads(TorchDispatchMode):
    """Counts values that are read from a device and copies between devices: each waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += function in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
        self.count += function is aten._to_copy.default and "device" in (kwargs or {})
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"distill": 0.5}, {"label_smoothing": 0.1}])
def test_a_step_never_waits_for_the_device(options):
    config = dataclasses.replace(CONFIG, batch_size=4, **options)
    teacher = linear(ROWS) if "distill" in options else None

    def reads(steps):
        data = FakeData([[1.0, 0.0], [0.0, 1.0]] * 2 * steps, [0, 1] * 2 * steps)
        data.share = 8 * steps  # the evaluation takes one batch, whatever the steps
        with Reads() as counted:
            (epoch,), _ = train(linear(ROWS), data, training_phase(0.1), config=config, teacher=teacher)
        assert epoch.images == 4 * steps
        return counted.count

    assert reads(2) == reads(7)


def test_a_network_is_compiled_for_the_sizes_of_its_batches(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: asked.append(options) or model)
    train(
        linear(ROWS),
        FakeData([[1.0, 0.0], [0.0, 1.0]], [0, 1]),
        training_phase(0.1),
        config=dataclasses.replace(CONFIG, compile=True),
    )
    assert asked == [{"dynamic": False}]
