"""Small networks that do what real ones do between their layers, and what the tests of their programs share."""

import copy

import torch
from helpers import randomise_batchnorm
from torch import nn
from torch.nn import functional

from laasp_ray.search.program import Program
from laasp_ray.search.tracing import trace

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """stem (6) -> BatchNorm -> `middle`, which a test defines -> tail (5) -> mean -> head (4)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv, self.other = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.tail, self.head = nn.Conv2d(6, 5, 1), nn.Linear(5, 4)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(6))

    def middle(self, x):
        raise ValueError("not for such an input")

    def forward(self, x):
        x = self.tail(self.middle(self.norm(self.stem(x))))
        return self.head(x.relu().mean((2, 3)))


class InPlaceModule(Body):
    def middle(self, x):
        x = self.relu(x)
        return self.relu(self.other(self.conv(x)) + x)


class InPlaceFunction(Body):
    def middle(self, x):
        x = functional.relu(x, inplace=True)
        return functional.leaky_relu(self.other(self.conv(x)), 0.1, inplace=True)


class InPlaceByPosition(Body):
    def middle(self, x):
        x = functional.relu(self.conv(functional.relu(x, True)), True)
        return functional.leaky_relu(self.conv(x), 0.1, True)


class SideBySide(Body):
    """The first of two readers of a value is overwritten before the second has run."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.tail = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x)), True)
        x = functional.relu(self.conv(x), True) + functional.silu(self.tail(x), inplace=True)
        return self.head(x.mean((2, 3)))


class InPlaceMethod(Body):
    def middle(self, x):
        x = x.relu_()
        return self.conv(x).sigmoid_().mul_(2)


class InPlaceSum(Body):
    def middle(self, x):
        y = self.conv(x)
        y += x
        y = self.relu(y)
        y -= 0.5
        y *= self.scale
        y /= 3
        return y


class SumIntoSecond(Body):
    def middle(self, x):
        x = self.relu(x)
        return self.relu(torch.add(functional.max_pool2d(x, 3, 1, 1), self.other(self.conv(x))))


class WeightedSum(Body):
    def middle(self, x):
        return torch.add(functional.relu(x), self.conv(x), alpha=0.3)


class SharedModules(Body):
    def middle(self, x):
        x = self.relu(self.other(self.conv(x)))
        return self.relu(self.other(self.conv(x)))


class DropsAndConstants(Body):
    def middle(self, x):
        x = self.drop(self.relu(x)) * self.scale
        x = functional.dropout(self.conv(x), 0.5, self.training) + self.shift.view(1, -1, 1, 1)
        return x * self.scale.unsqueeze(0).sigmoid() + self.scale


class NotFoldable(Body):
    """The convolution's own output is wanted too, beside the normalised one."""

    def middle(self, x):
        y = self.conv(x)
        return self.relu(self.other(y)) + y


class NormFirst(Body):
    def middle(self, x):
        return self.conv(self.relu(self.other(self.relu(x))))


class Concatenated(Body):
    def __init__(self):
        super().__init__()
        self.tail = nn.Conv2d(12, 5, 1)

    def middle(self, x):
        return torch.cat([functional.relu(x), self.conv(x)], 1)


class IgnoresResult(Body):
    """Works in place and goes on with what it worked on."""

    def middle(self, x):
        y = self.conv(x)
        y.relu_()
        self.relu(x)
        return x + y


class ReadAgain(Body):
    """What was changed in place is read again by its first name, under a module of the network's own as well."""

    class Swish(nn.Module):
        inplace = True

        def forward(self, x):
            return x.mul_(x.sigmoid()) if self.inplace else x * x.sigmoid()

    def __init__(self):
        super().__init__()
        self.swish = self.Swish()

    def middle(self, x):
        x = self.conv(functional.relu(x, inplace=True)) + x
        return self.conv(self.swish(x)) + x


class BySize(Body):
    def middle(self, x):
        x = self.relu(x)
        return self.conv(x.view(x.size(0), x.shape[1], -1).reshape(x.shape))


class SubclassedLayer(Body):
    """Its layer has a forward of its own, into which tracing does not go."""

    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight / self.weight.std(), self.bias) * 0.5

    def __init__(self):
        super().__init__()
        self.conv = self.Standardised(6, 6, 3, padding=1)

    def middle(self, x):
        return self.relu(self.conv(self.relu(x)))


TRACEABLE = [
    InPlaceModule,
    InPlaceFunction,
    InPlaceByPosition,
    SideBySide,
    InPlaceMethod,
    InPlaceSum,
    SumIntoSecond,
    WeightedSum,
    SharedModules,
    DropsAndConstants,
    NotFoldable,
    NormFirst,
    Concatenated,
    IgnoresResult,
    ReadAgain,
    BySize,
    SubclassedLayer,
]


def made(kind):
    return randomise_batchnorm(kind()).eval()


def program_of(model):
    program = trace(model, IMAGES[:1])
    assert isinstance(program, Program), program
    return program


@torch.inference_mode()
def outputs(model):
    return model(IMAGES.clone())


def masked_output(model, mask):
    """The network's outputs when these layers read zeros for these channels."""
    network = copy.deepcopy(model)
    for name, channels in mask.items():

        def mute(_, inputs, gone=channels):
            return (inputs[0].index_fill(-1 if inputs[0].ndim == 2 else 1, torch.tensor(gone), 0),)

        network.get_submodule(name).register_forward_pre_hook(mute)
    return outputs(network)


def run(program, masks_by_site, whole=False):
    return list(program.run(IMAGES, masks_by_site, whole=whole))


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
