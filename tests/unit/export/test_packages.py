"""The packages of the extra `export`, by the names of their distributions."""

from importlib import metadata

from laasp_ray.errors import ConfigError
from laasp_ray.export import packages
from laasp_ray.export.network import failed


def test_a_module_of_a_distribution_of_another_name_has_its_version(monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda: ("onnx", "onnxscript"))
    names = {"torch": ["torch"], "onnxruntime": ["onnxruntime-gpu"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: names)
    monkeypatch.setattr(metadata, "version", lambda name: {"torch": "2.9", "onnxruntime-gpu": "1.23"}[name])
    assert packages.versions() == {"torch": "2.9", "onnxruntime": "1.23"}
    names.pop("onnxruntime")  # a module without a distribution
    assert failed("onnx", ConfigError("no")).versions == {"torch": "2.9"}
