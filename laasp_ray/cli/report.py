"""`laasp-ray report` and `jobs/report.py`: the page of a run or of a sweep, or of several side by side."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from laasp_ray.cli.stopping import guarded
from laasp_ray.errors import ConfigError
from laasp_ray.report.page.document import FILE
from laasp_ray.report.page.reading import RunReader
from laasp_ray.report.page.run import run_page
from laasp_ray.report.page.several import Compared, comparison_page, sweep_page
from laasp_ray.report.sweep import row_from
from laasp_ray.store.storage import Storage
from laasp_ray.sweep.journal import is_sweep
from laasp_ray.sweep.page import read_sweep

COMPARISON = "comparison.html"


def report(arguments: Sequence[str] | None = None, prog: str = "report.py") -> int:
    """`laasp-ray report` and `jobs/report.py RUN [RUN ...] [--out FILE]`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="Writes a page (HTML) about a run or a sweep, finished or under way, from its journal alone; of "
        "several runs one page with all side by side.",
    )
    parser.add_argument("run", nargs="+", help="the folder of a run or of a sweep, or its s3:// or gs:// address")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the page (default: {FILE} in the folder of the run, {COMPARISON} here for several)",
    )

    def run() -> None:
        options = parser.parse_args(arguments)
        if options.out is not None and not options.out.parent.is_dir():
            raise ConfigError(f"--out {options.out}: there is no folder {options.out.parent}")
        if options.out is not None and options.out.is_dir():
            raise ConfigError(f"--out {options.out} is a folder: give the name of a file in it")
        folders = [Storage.open(given).brief() for given in options.run]
        if len(folders) > 1:
            html = comparison_page(_named_apart([one for folder in folders for one in _compared(folder)]))
            _write(html, options.out or Path(COMPARISON))
            return
        (folder,) = folders
        html = sweep_page(read_sweep(folder)) if is_sweep(folder) else run_page(RunReader(folder).read())
        if options.out is not None:
            _write(html, options.out)
        else:
            folder.write(FILE, html.encode())
            print(f"{folder.uri}/{FILE}")

    return guarded(run, stopped="stopped")


def _write(html: str, path: Path) -> None:
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror}; name another file") from error
    print(path)


def _named_apart(runs: list[Compared]) -> list[Compared]:
    """Runs of one name are called by their folders."""
    counts = Counter(run.row.name for run in runs)
    return [
        run if counts[run.row.name] == 1 else replace(run, row=replace(run.row, name=run.row.folder)) for run in runs
    ]


def _compared(folder: Storage) -> Iterator[Compared]:
    """The rows of a run, or of all trials of a sweep."""
    if is_sweep(folder):
        sweep = read_sweep(folder)
        for row in sweep.rows:
            yield Compared(row=replace(row, name=f"{sweep.name}/{row.name}"), config=sweep.config)
        return
    record = RunReader(folder).read()
    wanted = record.start.config.get("prune", {}).get("flops_reduction")
    target = f"{wanted:.2%}" if isinstance(wanted, float) and wanted else ""
    row = row_from(record.name, record.events, target=target, folder=folder.uri)
    yield Compared(row=row, config=record.start.config)
