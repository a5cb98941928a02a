"""One row of the preflight's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "warning", "failed"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of one check on all nodes."""

    name: str
    status: Status
    found: str
    """Summary of the nodes' state."""
    problems: tuple[str, ...] = ()
    """Deviations, each beginning with the name of its node."""
    fix: str = ""

    @classmethod
    def of(cls, name: str, found: str, problems: Sequence[str], fix: str, *, severity: Status = "failed") -> Check:
        """Build the result of a check.

        Args:
            severity: the status if there are problems.
        """
        if not problems:
            return cls(name=name, status="passed", found=found)
        return cls(name=name, status=severity, found=found, problems=tuple(problems), fix=fix)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-compatible values."""
        return asdict(self)
