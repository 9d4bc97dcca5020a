"""The console script `laasp-ray`, beside the scripts in jobs/."""

import tomllib
from pathlib import Path

import pytest

from laasp_ray import __version__
from laasp_ray.cli import console

PYPROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]


def printed(run, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    output = capsys.readouterr()
    return ended.value.code, output.out, output.err


def test_the_script_is_installed_by_its_name():
    assert PYPROJECT["scripts"] == {"laasp-ray": f"{console.main.__module__}:{console.main.__name__}"}


def test_version(capsys):
    assert printed(console.main, ["--version"], capsys) == (0, f"laasp-ray {__version__}\n", "")


@pytest.mark.parametrize("command", sorted(console.COMMANDS))
def test_a_command_takes_what_its_job_takes(command, capsys):
    status, ours, _ = printed(console.main, [command, "--help"], capsys)
    _, theirs, _ = printed(console.command(command), ["--help"], capsys)
    assert status == 0 and ours.startswith(f"usage: laasp-ray {command} ")
    options = ours.partition("positional arguments")[2]
    assert options and options == theirs.partition("positional arguments")[2]
    assert f"  {command} " in printed(console.main, ["--help"], capsys)[1]


@pytest.mark.parametrize("given", [[], ["prun"], ["--recipe"]])
def test_what_is_no_command_is_argparses_to_refuse(given, capsys):
    status, out, error = printed(console.main, given, capsys)
    assert status == 2 and out == "" and error.startswith("usage: laasp-ray")


def test_the_status_is_the_commands(capsys):
    assert console.main(["prune", "nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown recipe 'nonsense'")
