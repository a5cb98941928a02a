"""What every benchmark's report says of the machine, and how it is written."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def environment() -> str:
    """One line: what was measured on."""
    import torch

    python, machine = platform.python_version(), platform.machine()
    return f"{os.cpu_count()} CPU cores ({machine}), Python {python}, torch {torch.__version__}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def read(name: str) -> list[dict[str, Any]]:
    """The records of docs/benchmarks/NAME.json."""
    return json.loads((FOLDER / f"{name}.json").read_text())  # type: ignore[no-any-return]


def write(name: str, markdown: str, records: list[dict[str, Any]], json_file: str | None) -> None:
    """Write docs/benchmarks/NAME.md and .json, or where a file is given the records into that file alone."""
    text = json.dumps(records, indent=1) + "\n"
    if json_file is not None:
        Path(json_file).write_text(text)
    else:
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{name}.json").write_text(text)
        (FOLDER / f"{name}.md").write_text(markdown)
