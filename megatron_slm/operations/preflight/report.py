"""The verdict as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_slm.files import write_json
from megatron_slm.operations.preflight.checks import Check
from megatron_slm.operations.preflight.facts import Facts
from megatron_slm.operations.preflight.links import Measurements

_SHOWN_PROBLEMS = 12
_COLOURS = {"passed": "green", "warning": "yellow", "failed": "red"}


def verdict(checks: Sequence[Check]) -> str:
    """`ready`, or why not."""
    failed = [check.name for check in checks if check.status == "failed"]
    warned = [check.name for check in checks if check.status == "warning"]
    if failed:
        return f"NOT READY: {', '.join(failed)}"
    return "ready" + (f", with warnings: {', '.join(warned)}" if warned else "")


def print_report(checks: Sequence[Check], *, to_stderr: bool = False) -> None:
    """One row a check, and under it what is wrong and what to do; then the verdict."""
    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console = Console(stderr=to_stderr, width=160)
    table = Table(title="Preflight", show_lines=False)
    table.add_column("check", no_wrap=True)
    table.add_column("")
    table.add_column("found")
    for check in checks:
        lines = [check.found, *check.problems[:_SHOWN_PROBLEMS]]
        hidden = len(check.problems) - _SHOWN_PROBLEMS
        lines += [f"and {hidden} more"] * (hidden > 0) + [f"fix: {check.fix}"] * bool(check.problems)
        colour = _COLOURS[check.status]
        table.add_row(check.name, f"[{colour}]{check.status}[/{colour}]", "\n".join(_plain(line) for line in lines))
    console.print(table)
    console.print(f"Preflight: {_plain(verdict(checks))}", soft_wrap=True, highlight=False)


def _plain(text: str) -> str:
    """As it is: a bracket is no markup."""
    return text.replace("[", r"\[")


def write_report(path: str, checks: Sequence[Check], facts: Sequence[Facts], measured: Measurements | None) -> None:
    """Checks, measured links and all facts; `-` for standard output.

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
