"""The device of a process: a GPU that torch cannot use is an error, never the CPU in silence."""

import pytest
import torch

from laasp_ray.errors import ConfigError
from laasp_ray.models import device


@pytest.fixture
def machine(monkeypatch):
    """A machine with these GPUs, which torch cannot use."""

    def made(*gpus, visible=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(device, "gpus_here", lambda: list(gpus))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return made


def test_a_driver_that_is_too_old_is_an_error_with_torchs_reason(machine, monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    machine("0000:01:00.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigError) as raised:
        device.this_device()
    said = str(raised.value)
    assert "1 NVIDIA GPUs" in said
    assert torch.__version__ in said
    assert "too old (found version 11040). Please update it. Install a driver" in said
    assert "CUDA_VISIBLE_DEVICES=" in said


def test_a_torch_without_cuda_is_an_error_too(machine, monkeypatch):
    def init():
        raise AssertionError("Torch not compiled with CUDA enabled")

    machine("nvidia0", "nvidia1")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigError, match=r"2 NVIDIA GPUs .* Torch not compiled with CUDA enabled"):
        device.this_device()


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_not_missed(machine, visible):
    machine("nvidia0", visible=visible)
    assert device.this_device() == torch.device("cpu")


def test_a_machine_without_gpus_computes_on_its_cpu(machine):
    machine()
    assert device.this_device() == torch.device("cpu")
    machine(visible="0")
    assert device.this_device() == torch.device("cpu")


def test_a_gpu_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.this_device() == torch.device("cuda")


def test_gpus_are_seen_without_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_PROC", tmp_path / "none")
    monkeypatch.setattr(device, "_DEV", tmp_path)
    assert device.gpus_here() == []
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert device.gpus_here() == ["nvidia0", "nvidia1"]
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    monkeypatch.setattr(device, "_PROC", tmp_path / "gpus")
    assert device.gpus_here() == ["0000:01:00.0"]


class Copied:
    """A tensor on the CPU that says how it is copied."""

    def __init__(self, elements=4):
        self.elements, self.calls = elements, []

    def numel(self):
        return self.elements

    def pin_memory(self):
        self.calls.append("pinned")
        return self

    def to(self, where, non_blocking=False):
        self.calls.append((where.type, non_blocking))
        return self


def test_a_copy_to_a_gpu_is_pinned_and_not_waited_for():
    for where, elements, expected in (
        ("cuda", 4, ["pinned", ("cuda", True)]),
        ("cuda", 0, [("cuda", False)]),
        ("cpu", 4, [("cpu", False)]),
    ):
        tensor = Copied(elements)
        device.on_device(tensor, torch.device(where))
        assert tensor.calls == expected
