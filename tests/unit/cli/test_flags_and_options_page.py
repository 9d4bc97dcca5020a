"""A key's doc is the one source of what --help and the options page say of it."""

import dataclasses
import typing

import pytest

from laasp_ray.cli import main as cli
from laasp_ray.cli.flags import FILTER_FLAGS, FLAGS, SPARSITY_FLAGS, Flag
from laasp_ray.cli.options_page import PAGE, page
from laasp_ray.config import SECTIONS, PruneConfig, RunConfig, SearchConfig
from laasp_ray.config.fields import docs
from laasp_ray.config.run import doc_of_key


def sections():
    for name, hint in typing.get_type_hints(RunConfig).items():
        for part in SECTIONS.values() if hint is PruneConfig else (hint,):
            if dataclasses.is_dataclass(part):
                yield name, part


@pytest.mark.parametrize(("name", "section"), sections(), ids=lambda value: getattr(value, "__name__", value))
def test_every_key_has_a_line_that_ends_like_no_sentence(name, section):
    lines = docs(section)
    assert list(lines) == [field.name for field in dataclasses.fields(section)]
    for key, line in lines.items():
        assert 10 < len(line) < 200 and "\n" not in line and not line.endswith("."), (name, key)


def test_the_doc_of_a_dotted_key():
    assert doc_of_key("search.racing_error") == "chance that racing drops the best candidate, below one half"
    assert doc_of_key("prune.group") == "consecutive inputs of a layer that make a group, at least 2"
    assert doc_of_key("seed") == "the one source of randomness"
    assert doc_of_key("search.none") == doc_of_key("prune.none") == "" and next(iter(docs(SearchConfig))) == "images"


def test_every_flag_is_of_a_key_with_a_doc():
    assert [flag for flag, entry in FLAGS.items() if not doc_of_key(entry.key)] == []
    assert Flag("seed").help == "the one source of randomness [seed]"
    assert Flag("seed", int, "a whole number").help == "the one source of randomness; a whole number [seed]"


@pytest.mark.parametrize("command", ["prune", "sparsify"])
def test_help_says_the_docs_of_the_keys(command, capsys):
    with pytest.raises(SystemExit):
        getattr(cli, command)(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for entry in (FILTER_FLAGS if command == "prune" else SPARSITY_FLAGS).values():
        for word in (*doc_of_key(entry.key).split(), f"[{entry.key}]"):
            assert word.split("-")[0] in said, (entry.key, word)


def test_the_committed_page_is_current():
    assert PAGE.read_text() == page(), "run: make options"


def test_the_page_has_a_row_for_every_key():
    text = page()
    assert (
        "| `search.images` | whole number | `5000` | training images that a candidate's loss is measured on; all there "
        "are if fewer (`--calibration-images`) |" in text
    )
    assert "| `data.path` | text or none | `null` | " in text
    assert "| `train.epochs` | whole number | required | " in text
    assert "| `data.ratio` | list of 2 numbers | `[0.75, 1.333]` | " in text
    for name, section in sections():
        for field in dataclasses.fields(section):
            # The fit of pls is told with each method that has it; sparse stages say what a fine-tune is to them.
            own = {"prune.components": 2, "prune.pooling": 2}
            assert text.count(f"| `{name}.{field.name}` |") == own.get(f"{name}.{field.name}", 1)


def test_each_command_has_the_flags_of_its_methods():
    assert {"--method", "--percent", "--calibration-images", "--flops-reduction"} <= FILTER_FLAGS.keys()
    assert not {"--group", "--stages", "--from-run", "--epochs-per-stage"} & FILTER_FLAGS.keys()
    assert {"--group", "--stages", "--from-run", "--epochs-per-stage", "--data"} <= SPARSITY_FLAGS.keys()
    assert not {"--method", "--percent", "--calibration-images", "--flops-reduction"} & SPARSITY_FLAGS.keys()
