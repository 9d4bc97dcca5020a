"""What bench/gpu.py writes: rows as they come, and from them one JSON file and one page in Markdown."""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REHEARSAL = "REHEARSAL on a CPU at toy size: no number on this page is a GPU's."
ROWS = "rows.jsonl"


class Rows:
    """The rows of one stage, appended to a file one by one, so that a stage that is killed keeps those it has."""

    def __init__(self, folder: Path, stage: str) -> None:
        self._file, self._stage, self._began = folder / ROWS, stage, time.monotonic()

    def add(self, what: str, figures: Mapping[str, Any], passed: bool | None = None, error: str = "") -> None:
        """`passed` is None for what is measured and has no right answer."""
        row = {
            "stage": self._stage,
            "what": what,
            "passed": False if error else passed,
            "figures": {key: rounded(value) for key, value in figures.items()},
            "error": error,
            "after_s": round(time.monotonic() - self._began, 1),
        }
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{self._stage}: {line_of(row)}", flush=True)

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """An error inside becomes a row, and the stage goes on."""
        try:
            yield
        except Exception as error:  # whatever breaks here must not hide what comes after it
            traceback.print_exc()
            first = " ".join(str(error).split())[:400]
            self.add(what, {}, error=f"{type(error).__name__}: {first}")


@dataclass
class StageResult:
    """`outcome`: done, failed, late (its time was over) or skipped, with the `reason`."""

    name: str
    outcome: str
    seconds: float = 0.0
    limit: float = 0.0
    reason: str = ""


@dataclass
class Results:
    """All that is known so far. `write` replaces both files, which are whole at any moment."""

    folder: Path
    device: str
    machine: dict[str, Any] = field(default_factory=dict)
    stages: list[StageResult] = field(default_factory=list)

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    def rows(self) -> list[dict[str, Any]]:
        file = self.folder / ROWS
        lines = file.read_text().splitlines() if file.exists() else []
        found = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # a line that a killed stage did not finish
                found.append(json.loads(line))
        return found

    def write(self) -> None:
        rows = self.rows()
        content = {
            "note": REHEARSAL if self.rehearsal else "",
            "device": self.device,
            "machine": self.machine,
            "stages": [asdict(stage) for stage in self.stages],
            "rows": rows,
        }
        _replace(self.folder / "results.json", json.dumps(content, indent=1) + "\n")
        _replace(self.folder / "results.md", self.page(rows))

    def page(self, rows: list[dict[str, Any]]) -> str:
        """The page in Markdown."""
        lines = ["# bench/gpu.py", ""]
        if self.rehearsal:
            lines += [f"**{REHEARSAL}**", ""]
        lines += [f"- {key}: {_shown(value)}" for key, value in self.machine.items()]
        wrong = [row for row in rows if row["passed"] is False]
        right = sum(row["passed"] is True for row in rows)
        lines += ["", f"{right} checks passed, {len(wrong)} did not.", ""]
        lines += ["| stage | outcome | s | limit s |", "|---|---|---|---|"]
        for stage in self.stages:
            outcome = stage.outcome + (f": {_cell(stage.reason)}" if stage.reason else "")
            lines.append(f"| {stage.name} | {outcome} | {stage.seconds:.0f} | {stage.limit:.0f} |")
        for name in dict.fromkeys(row["stage"] for row in rows):
            lines += ["", f"## {name}", "", "| what | right | figures |", "|---|---|---|"]
            for row in rows:
                if row["stage"] == name:
                    lines.append(f"| {_cell(row['what'])} | {_verdict(row)} | {_cell(figures_of(row))} |")
        return "\n".join(lines) + "\n"


def rounded(value: Any) -> Any:
    """Floats with four significant digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def line_of(row: Mapping[str, Any]) -> str:
    """A row in one line of text."""
    return f"{row['what']}: {_verdict(row)} {figures_of(row)}"


def figures_of(row: Mapping[str, Any]) -> str:
    return row["error"] or "; ".join(f"{key} {_shown(value)}" for key, value in row["figures"].items())


def _verdict(row: Mapping[str, Any]) -> str:
    if row["error"]:
        return "ERROR"
    return {True: "yes", False: "NO", None: ""}[row["passed"]]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _replace(file: Path, content: str) -> None:
    aside = file.with_suffix(file.suffix + ".new")
    aside.write_text(content)
    aside.replace(file)
