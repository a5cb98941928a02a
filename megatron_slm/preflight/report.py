"""The result of a preflight as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_slm.files import write_json
from megatron_slm.preflight.check import Check
from megatron_slm.preflight.facts import Facts
from megatron_slm.preflight.links import Measurements

_MAX_PROBLEMS_SHOWN = 12
_COLORS = {"passed": "green", "warning": "yellow", "failed": "red"}


def verdict(checks: Sequence[Check]) -> str:
    """Return `ready` or `NOT READY`, with the names of the checks that failed or warned."""
    failed = [check.name for check in checks if check.status == "failed"]
    warned = [check.name for check in checks if check.status == "warning"]
    if failed:
        return f"NOT READY: {', '.join(failed)}"
    return "ready" + (f", with warnings: {', '.join(warned)}" if warned else "")


def print_report(checks: Sequence[Check], *, to_stderr: bool = False) -> None:
    """Print one row per check with its problems and their fix, then the verdict."""
    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console = Console(stderr=to_stderr, width=160)
    table = Table(title="Preflight", show_lines=False)
    table.add_column("check", no_wrap=True)
    table.add_column("")
    table.add_column("found")
    for check in checks:
        color = _COLORS[check.status]
        text = "\n".join(escape(line) for line in _lines(check))
        table.add_row(check.name, f"[{color}]{check.status}[/{color}]", text)
    console.print(table)
    console.print(f"Preflight: {escape(verdict(checks))}", soft_wrap=True, highlight=False)


def _lines(check: Check) -> list[str]:
    lines = [check.found, *check.problems[:_MAX_PROBLEMS_SHOWN]]
    if len(check.problems) > _MAX_PROBLEMS_SHOWN:
        lines.append(f"and {len(check.problems) - _MAX_PROBLEMS_SHOWN} more")
    if check.problems:
        lines.append(f"fix: {check.fix}")
    return lines


def write_report(path: str, checks: Sequence[Check], facts: Sequence[Facts], measured: Measurements | None) -> None:
    """Write checks, measured links and all facts as JSON; `-` is standard output.

    Raises:
        ConfigError: the file cannot be written.
    """
    write_json(
        path,
        {
            "verdict": verdict(checks),
            "ready": not any(check.status == "failed" for check in checks),
            "checks": [check.to_dict() for check in checks],
            "measured": None if measured is None else measured.to_dict(),
            "facts": list(facts),
        },
    )
