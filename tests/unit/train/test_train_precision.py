"""train.precision: what training computes in, and a step in bfloat16."""

import dataclasses

import pytest
import torch
from torch import nn
from training_by_hand import PLAIN, TWO, train, training_phase

from laasp_ray.config import TrainConfig
from laasp_ray.errors import ConfigError
from laasp_ray.train import precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("named", "on_gpu", "on_cpu_with_it", "on_cpu_without"),
    [
        ("gpu", True, False, False),
        ("auto", True, True, False),
        ("float32", False, False, False),
        ("bfloat16", True, True, True),
    ],
)
def test_where_training_is_in_bfloat16(monkeypatch, named, on_gpu, on_cpu_with_it, on_cpu_without):
    assert precision.is_bfloat16(named, GPU) == on_gpu
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False}, raising=False)
    assert precision.is_bfloat16(named, CPU) == on_cpu_with_it
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx2": True}, raising=False)
    assert precision.is_bfloat16(named, CPU) == on_cpu_without


def test_an_older_torch_does_not_say_what_a_cpu_has(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not precision.cpu_has_bfloat16()


class Seen(nn.Linear):
    """A layer that keeps the dtype of its output."""

    def forward(self, x):
        output = super().forward(x)
        if self.training:
            self.dtype = output.dtype
        return output


@pytest.mark.parametrize(("named", "dtype"), [("gpu", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_step_computes_in_it_and_weights_stay_in_float32(named, dtype):
    layer = Seen(2, 2, bias=False)
    nn.init.constant_(layer.weight, 1 + 2**-10)  # not a number of bfloat16, in which it is 1
    (epoch,), _ = train(layer, TWO, training_phase(0.5), config=dataclasses.replace(PLAIN, precision=named))
    assert layer.dtype == dtype
    # The step is that of test_training_options: a quarter of the rate, from equal outputs.
    wanted = 1 + 2**-10 + torch.tensor([[0.125, -0.125], [-0.125, 0.125]])
    torch.testing.assert_close(epoch.tensors["weight"], wanted, rtol=0, atol=1e-6)


def test_other_names_are_refused():
    with pytest.raises(
        ConfigError, match=r"train\.precision is 'half', must be one of 'gpu', 'auto', 'float32', 'bfloat16'"
    ):
        TrainConfig(epochs=1, prune_epoch=0, precision="half")
