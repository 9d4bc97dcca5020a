"""The nearest known names, and what an import path names."""

import pytest

from laasp_ray.config.names import did_you_mean, imported, is_import_path
from laasp_ray.errors import ConfigError

NUMBER = 3


def test_the_nearest_names_are_told():
    assert did_you_mean("euclidian", ("l1", "euclidean", "cosine")) == "did you mean euclidean?"
    assert did_you_mean("stepp", ("step", "steps"), most=2) == "did you mean step or steps?"
    assert did_you_mean("stepp", iter(["step"]), prefix="prune.") == "did you mean prune.step?"
    assert did_you_mean("zzz", ("l1", "euclidean")) == ""


def test_what_has_a_colon_is_an_import_path():
    assert is_import_path("a.b:c")
    assert not is_import_path("torchvision.resnet50")


def test_what_is_named_is_given():
    assert imported("laasp_ray.config.names:did_you_mean", "criterion") is did_you_mean


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("laasp_ray.errors:nothing", "AttributeError: .*'nothing'"),
        (":", "ValueError: "),
        (".relative:f", "TypeError: "),
        ("broken_module:f", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_imported_is_told_with_value_place_and_remedy(path, why, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    remedy = r"must read package\.module:name, of a module that Python finds here and on every worker"
    with pytest.raises(ConfigError, match=rf"data\.format '{path}' cannot be imported \({why}.*\); it {remedy}"):
        imported(path, "data.format")


def test_what_cannot_be_called_is_refused():
    with pytest.raises(ConfigError, match=rf"criterion '{__name__}:NUMBER' is a int, must be a function or a class"):
        imported(f"{__name__}:NUMBER", "criterion")


def test_a_plain_name_is_refused_before_anything_is_imported(tmp_path, monkeypatch):
    (tmp_path / "plain_name_module.py").write_text("raise SystemExit('its code ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"train.loss 'plain_name_module' must read package.module:"):
        imported("plain_name_module", "train.loss")
