"""Small networks as files: exact differences, new biases, and the reasons why there is no file."""

import dataclasses
import importlib.util
import io
from collections import namedtuple

import onnx
import pytest
import torch
from torch import nn

from laasp_ray.config import ExportConfig
from laasp_ray.errors import ConfigError, ExportError
from laasp_ray.export import packages
from laasp_ray.export.graph import planned_convolutions
from laasp_ray.export.network import Export, compare, export_network, failed, onnx_session
from laasp_ray.pruning.plan import Plan, apply_plan

SHAPE = (3, 8, 8)
KEPT = (0, 3, 4)
PLAN = Plan(
    tensors={"first.weight": {0: (KEPT,)}, "second.weight": {1: (KEPT,)}},
    attributes={"first": {"out_channels": 3}, "second": {"in_channels": 3}},
    layers={"first": KEPT},
).with_biases(["second"])


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 4, 3, bias=False)

    def forward(self, x):
        return self.second(self.first(x).relu()).mean((2, 3))


@pytest.fixture(scope="module")
def pruned():
    torch.manual_seed(0)
    network = Small()
    apply_plan(network, PLAN)
    with torch.no_grad():
        network.second.bias.copy_(torch.tensor([10.0, 20.0, 30.0, 40.0]))
    return network.train()


@pytest.fixture(scope="module")
def made(pruned):
    return export_network(pruned, SHAPE, planned_convolutions(Small(), PLAN), "onnx")


def test_the_file_takes_any_number_of_images_and_has_the_plans_new_biases(pruned, made):
    assert pruned.training
    record = made.record
    assert (record.file, record.reason, record.convolutions, record.batches) == ("model.onnx", "", 2, (1, 3))
    assert record.bytes == len(made.content) and record.opset >= 18
    assert 39 < record.largest_output < 42 and record.max_difference < 1e-5
    session = onnx_session(made.content, 1)
    images = torch.randn(7, *SHAPE)
    given = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    with torch.inference_mode():
        assert torch.allclose(given, pruned(images), atol=1e-5)
        bare = torch.nn.functional.conv2d(pruned.first(images).relu(), pruned.second.weight).mean((2, 3))
    assert torch.allclose(given - bare, torch.tensor([10.0, 20, 30, 40]).expand(7, 4), atol=1e-4)


def test_the_record_says_it_in_a_sentence():
    record = Export(
        format="onnx", file="model.onnx", opset=20, convolutions=53, max_difference=6.1e-6, largest_output=4.19
    )
    assert record.text == (
        "Exported: pruned/model.onnx, opset 20, 53 convolutions as planned; outputs within 6.1e-06 of torch's, which "
        "go up to 4.19"
    )
    assert failed("torch", ExportError("it has an if")).text == "Not exported (torch): it has an if"
    assert failed("onnx", ValueError("odd")).reason == "ValueError: odd"


def test_a_program_of_torch_export_is_read_again(pruned):
    made = export_network(pruned, SHAPE, planned_convolutions(Small(), PLAN), "torch")
    assert (made.record.file, made.record.max_difference, made.record.opset) == ("model.pt2", 0.0, None)
    images = torch.randn(5, *SHAPE)
    with torch.inference_mode():
        assert torch.equal(torch.export.load(io.BytesIO(made.content)).module()(images), pruned.eval()(images))
    pruned.train()


def test_another_plan_than_the_networks_is_refused(pruned):
    with pytest.raises(
        ExportError, match=r"first\.weight \(3, 3, 3, 3\) in 1 groups, planned first\.weight \(6, 3, 3, 3\)"
    ):
        export_network(pruned, SHAPE, planned_convolutions(Small(), Plan.empty()), "torch")


def test_a_network_that_cannot_be_followed_is_told_with_the_reason():
    class Branches(Small):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(ExportError, match=r"torch\.export cannot follow the network \(.*data-dependent"):
        export_network(Branches(), SHAPE, planned_convolutions(Branches(), Plan.empty()), "onnx")


Pair = namedtuple("Pair", ("out", "aux"))


@pytest.mark.parametrize("format", ["onnx", "torch"])
@pytest.mark.parametrize(
    ("output", "said"),
    [
        (lambda x: {"out": x, "aux": x}, r"a dict \(out, aux\)"),
        (lambda x: (x, x), r"a tuple \(2 parts\)"),
        (lambda x: [x], r"a list \(1 parts\)"),
        (lambda x: Pair(x, x), r"a Pair \(out, aux\)"),
        (lambda x: None, r"a NoneType"),
    ],
)
def test_a_network_that_gives_more_than_a_tensor_is_refused(output, said, format):
    class Structured(Small):
        def forward(self, x):
            return output(super().forward(x))

    message = rf"^the network gives {said}; only networks with one tensor as output are exported$"
    with pytest.raises(ExportError, match=message):
        export_network(Structured(), SHAPE, planned_convolutions(Small(), Plan.empty()), format)


def test_any_other_failure_is_an_export_error_with_its_kind(monkeypatch, pruned):
    planned = planned_convolutions(Small(), PLAN)
    with pytest.raises(ExportError, match=r"^the export failed \(RuntimeError: Given groups=1, weight of size"):
        export_network(pruned, (5, 8, 8), planned, "torch")

    def fail(*_):
        raise KeyError("graph")

    monkeypatch.setattr("laasp_ray.export.network.check_convolutions", fail)
    with pytest.raises(ExportError, match=r"^the export failed \(KeyError: 'graph'\)$"):
        export_network(pruned, SHAPE, planned, "torch")


def test_outputs_that_differ_are_refused():
    network = Small().eval()
    with torch.inference_mode():
        assert compare(network, network, SHAPE)[0] == 0.0
        difference, largest = compare(network, lambda images: network(images) * 1.0005, SHAPE)
        assert difference == pytest.approx(0.0005 * largest, rel=1e-2)
        with pytest.raises(ExportError, match=r"computes something else: its outputs differ from torch's by up to"):
            compare(network, lambda images: network(images) * 1.002, SHAPE)
        with pytest.raises(ExportError, match=r"gives \(1, 3\) for 1 images, torch \(1, 4\)"):
            compare(network, lambda images: network(images)[:, :3], SHAPE)
        with pytest.raises(ExportError, match=r"outputs that are not finite for 1 random images"):
            compare(network, lambda images: network(images) / 0, SHAPE)


def test_onnx_without_its_packages(monkeypatch, pruned):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "onnxscript" else find(name, *more)
    )
    assert packages.missing() == ("onnxscript",)
    with pytest.raises(
        ConfigError, match=r"export\.format is 'onnx', which needs onnxscript: pip install .*--export torch"
    ):
        packages.check_export(ExportConfig(format="onnx"))
    for other in ("auto", "torch", "none"):
        packages.check_export(ExportConfig(format=other))
    with pytest.raises(ExportError, match=r"ONNX needs onnxscript: pip install 'laasp_ray\[export\]'"):
        export_network(pruned, SHAPE, planned_convolutions(Small(), PLAN), "onnx")


def test_the_extra_has_the_packages():
    assert onnx.__version__ and packages.missing() == ()
    assert set(packages.versions()) == {"torch", *packages.PACKAGES}
    assert dataclasses.replace(ExportConfig(), format="onnx").latency == ("eager", "compile", "onnxruntime")
