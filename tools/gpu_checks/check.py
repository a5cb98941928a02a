"""A check and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["held", "failed", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the checks run on."""

    folder: Path
    """For the files of one check."""
    small: bool
    """True for tiny shapes, as on a CPU."""
    num_gpus: int
    """0 on a CPU."""

    @property
    def device(self) -> str:
        """Type of the device, as torch names it."""
        return "cuda" if self.num_gpus else "cpu"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a check found."""

    held: bool
    summary: str
    """One line for the table."""
    figures: dict[str, Any] = field(default_factory=dict)


class SkipCheck(Exception):
    """This machine lacks what the check is about; the message says what."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of the table."""

    name: str
    what: str
    """What holds if the check holds."""
    run: Callable[[Setting], Outcome]
    """Runs in a process of its own.

    Raises:
        SkipCheck: there is nothing to check here.
    """
    limit_seconds: int
    processes: int = 1
    """Processes with a GPU each, where the machine has GPUs."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A check that ended."""

    name: str
    what: str
    status: Status
    summary: str
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    output: str = ""
    """Last lines of a failed check's output."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-compatible values."""
        return asdict(self)
