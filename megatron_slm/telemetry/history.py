"""Append-only JSONL logs, deduplicated across resumes."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any

from megatron_slm.errors import RunFolderError, os_errors_as

KEEP_ALL = 2**62
"""A step to resume from, beyond all steps: earlier records are all kept."""


class History:
    """A JSONL file, opened and closed for each line.

    A resumed run first drops the lines of steps after its checkpoint, then appends. A new run renames the file of an
    older run to NAME.1.jsonl, NAME.2.jsonl and so on.

    Args:
        path: created with the first line.
        resume_step: step of the checkpoint that the run resumes from; 0 for a new run.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self.path = path
        kept: list[str] = []
        if path.exists() and path.stat().st_size:
            if resume_step:
                kept = _lines_up_to(path, resume_step)
            else:
                path.rename(_unused(path))
        self.resumed_lines: list[dict[str, Any]] = [json.loads(line) for line in kept]
        """Lines up to `resume_step`."""
        if path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            temporary.replace(path)

    def append(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def disk_errors(run_dir: str | Path) -> AbstractContextManager[None]:
    """Translate operating system errors inside the context into a `RunFolderError`."""
    fix = "free disk space or choose another folder, then resume"
    return os_errors_as(RunFolderError, "--run-dir", run_dir, "be writable", fix)


def _unused(path: Path) -> Path:
    """Return the first of NAME.1.jsonl, NAME.2.jsonl, ... that does not exist."""
    names = (path.with_suffix(f".{number}.jsonl") for number in count(1))
    return next(name for name in names if not name.exists())


def _lines_up_to(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # truncated by a kill
    return kept
