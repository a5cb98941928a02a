"""Configuration of early stops and the watchdog."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.rules import require, require_positive

STOP_FILE = "STOP"
"""File in the run's folder whose creation asks the run to stop. The run deletes it when it stops."""


@dataclass(frozen=True, kw_only=True)
class ResilienceConfig:
    """Early stops and the watchdog against hangs (docs/operations.md)."""

    exit_interval: int | None = None
    """Save a checkpoint and exit with code 0 after a step divisible by this."""
    exit_duration_in_mins: float | None = None
    """Save a checkpoint and exit with code 0 after the first step that ends this many minutes after the start."""
    watchdog_factor: float = 10.0
    """Report a step, or a batch of an evaluation, that takes this many times the median; 0 disables the watchdog. The
    report (RUN_DIR/hang) contains every rank's stack and position in the schedule, and names the rank that blocks the
    others."""
    watchdog_min_seconds: float = 120.0
    """Never report steps shorter than this, in seconds."""
    watchdog_exit_factor: float = 2.0
    """Exit with code 3 when a step takes this many times the reporting limit."""
    watchdog_allowance_minutes: float = 60.0
    """Reporting limit, in minutes, where there is no median: saves, probes, profiles and the first three steps."""

    def __post_init__(self) -> None:
        require_positive(
            self, "exit_interval", "exit_duration_in_mins", "watchdog_min_seconds", "watchdog_allowance_minutes"
        )
        require(
            self.watchdog_factor == 0 or self.watchdog_factor > 1,
            self,
            "watchdog_factor",
            "be above 1, or 0 to disable the watchdog",
            "use e.g. 10",
        )
        rule = "be at least 1 (1: exit at the report)"
        require(self.watchdog_exit_factor >= 1, self, "watchdog_exit_factor", rule, "use e.g. 2")
