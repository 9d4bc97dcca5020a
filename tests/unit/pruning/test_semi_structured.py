"""2:4 kernels: what can run through them, the 1x1 convolution as a linear layer, and on a GPU the outputs."""

import pytest
import torch
from torch import nn

from laasp_ray.errors import PruningError
from laasp_ray.pruning.sparsity.groups import GroupRule, group_mask
from laasp_ray.pruning.sparsity.semi_structured import SparsePointwise, to_semi_structured, why_not


def sparse(module, rule=GroupRule(4, 2)):  # noqa: B008
    module.weight.data *= group_mask(module.weight, rule)
    return module


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3),
        sparse(nn.Conv2d(64, 128, 1, stride=2)),
        nn.ReLU(),
        sparse(nn.Conv2d(128, 64, 1, bias=False), GroupRule(8, 6)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        sparse(nn.Linear(64, 32)),
        nn.Linear(32, 10),
    ).eval()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(64, 32, 3), "no 1x1 convolution without padding"),
        (nn.Conv2d(64, 32, 1, padding=1), "no 1x1 convolution without padding"),
        (nn.Conv2d(128, 32, 1, groups=2), "grouped convolution"),
        (nn.Linear(64, 10), "10 x 64 weights, no multiples of 32 and 64"),
        (nn.Linear(32, 32), "32 x 32 weights, no multiples of 32 and 64"),
        (nn.Linear(64, 32), "not 2:4 sparse"),
        (sparse(nn.Linear(64, 32)), ""),
        (sparse(nn.Conv2d(64, 32, 1), GroupRule(8, 6)), ""),
    ],
)
def test_what_can_run_sparse(module, reason):
    assert why_not(module) == reason


@pytest.mark.parametrize(("stride", "bias"), [(1, True), (2, False), ((2, 1), True)])
def test_a_1x1_convolution_is_a_linear_layer_over_the_pixels(stride, bias):
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 4, 1, stride=stride, bias=bias)
    images = torch.randn(2, 8, 7, 6)
    torch.testing.assert_close(SparsePointwise(convolution)(images), convolution(images))


def test_a_network_on_the_cpu_is_refused():
    with pytest.raises(PruningError, match="is on cpu: 2:4 kernels need a CUDA device"):
        to_semi_structured(network().half())


@pytest.mark.gpu
def test_the_outputs_are_those_of_the_dense_network():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    dense = network().cuda().half()
    images = torch.randn(16, 3, 18, 18, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        wanted = dense(images)
        conversion = to_semi_structured(dense)
        found = dense(images)
    assert conversion.converted == ("1", "3", "6")
    assert list(conversion.left) == ["0", "7"]
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_single_precision_is_refused():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with pytest.raises(PruningError, match=r"is in torch\.float32"):
        to_semi_structured(network().cuda())
