"""The results as JSON, as a page, and as a table."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_checks.check import Result


def table(results: Sequence[Result]) -> str:
    """One line a check."""
    width = max((len(result.name) for result in results), default=0)
    lines = [f"{r.name:{width}}  {r.status:7}  {r.seconds:5.0f} s  {r.summary}" for r in results]
    return "\n".join(lines)


def write(folder: Path, results: Sequence[Result], *, num_gpus: int, small: bool) -> None:
    """Write gpu_check.json and gpu_check.md."""
    made = {
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}",
        "gpus": num_gpus,
        "small": small,
        "checks": [result.to_dict() for result in results],
    }
    (folder / "gpu_check.json").write_text(json.dumps(made, indent=1) + "\n")
    (folder / "gpu_check.md").write_text(_markdown(results, made))


def _markdown(results: Sequence[Result], made: dict[str, Any]) -> str:
    where = (
        f"{made['gpus']} GPU(s)" if made["gpus"] else "**no GPU**: on the CPU, in small; nothing here is about a GPU"
    )
    failed = [result.name for result in results if result.status == "failed"]
    skipped = sum(result.status == "skipped" for result in results)
    verdict = f"failed: {', '.join(failed)}" if failed else "nothing failed"
    lines = [
        "# GPU check",
        "",
        f"{made['made']}, {made['machine']}, {where}. {len(results)} checks, {skipped} skipped, {verdict}.",
        "",
        "| check | | seconds | what holds if it held | found |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in results:
        status = f"**{r.status}**" if r.status == "failed" else r.status
        lines.append(f"| {r.name} | {status} | {r.seconds:.0f} | {r.what} | {_cell(r.summary)} |")
    for r in results:
        if r.figures or r.output:
            lines += ["", f"## {r.name}", ""]
        if r.output:
            lines += ["```", r.output, "```"]
        lines += _figures(r.figures)
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _figures(figures: dict[str, Any]) -> list[str]:
    """Records as a table, all else as a list."""
    lines: list[str] = []
    for name, value in figures.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            columns = list(dict.fromkeys(column for row in value for column in row))
            lines += [
                "",
                f"{name}:",
                "",
                "| " + " | ".join(columns) + " |",
                "| " + " | ".join("---" for _ in columns) + " |",
            ]
            lines += ["| " + " | ".join(_cell(_shown(row.get(column))) for column in columns) + " |" for row in value]
        else:
            lines.append(f"- {name}: {_cell(_shown(value))}")
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
