"""Files of one JSON object a line that tell a run's history, once, however often it is resumed."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any

from megatron_slm.errors import RunFolderError, os_errors_as


class History:
    """A file that lines are appended to, each flushed as written.

    A resumed run appends; lines of steps that are done again (those after the checkpoint) are dropped first. A run that
    starts afresh keeps an older run's file beside its own, as NAME.1.jsonl, NAME.2.jsonl and so on.

    Args:
        path: of the file; it is made with the first line where there is none.
        resume_step: the step that the run goes on from; 0 where it starts afresh.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self.path = path
        kept: list[str] = []
        if path.exists() and path.stat().st_size:
            if resume_step:
                kept = _lines_up_to(path, resume_step)
            else:
                path.rename(next(p for i in count(1) if not (p := path.with_suffix(f".{i}.jsonl")).exists()))
        self.resumed_lines: list[dict[str, Any]] = [json.loads(line) for line in kept]
        """What was recorded up to the step that the run resumes from."""
        if path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            temporary.replace(path)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def disk_errors(run_dir: str | Path) -> AbstractContextManager[None]:
    """What the disk says inside becomes a `RunFolderError`."""
    fix = "free the disk, or choose another folder; then resume"
    return os_errors_as(RunFolderError, "--run-dir", run_dir, "can be written", fix)


def _lines_up_to(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # a line cut off by a kill
    return kept
