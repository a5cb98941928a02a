"""When a run ends by itself, and when its watchdog ends it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.errors import ConfigError

STOP_FILE = "STOP"
"""In the run's folder: whoever makes it asks the run to stop. It is deleted when the run does."""


@dataclass(frozen=True, kw_only=True)
class ResilienceConfig:
    """Stopping early, and not hanging (docs/operations.md)."""

    exit_interval: int | None = None
    """Stop after a step that is a multiple of this, with a checkpoint and exit code 0."""
    exit_duration_in_mins: float | None = None
    """Stop after the first step that ends this many minutes after the start, with a checkpoint and exit code 0."""
    watchdog_factor: float = 10.0
    """Report a step, or a batch of an evaluation, that takes this many times their median; 0: no watchdog. The report
    (RUN_DIR/hang) has every rank's stack and place in the schedule, and names the rank that the others wait for."""
    watchdog_min_seconds: float = 120.0
    """A step shorter than this is never reported, whatever the median."""
    watchdog_exit_factor: float = 2.0
    """End the run with exit code 3 where a step takes this many times what it is reported at."""
    watchdog_allowance_minutes: float = 60.0
    """What is reported instead where there is no median: a save, a probe, a profile, and the first three steps."""

    def __post_init__(self) -> None:
        for name in ("exit_interval", "exit_duration_in_mins", "watchdog_min_seconds", "watchdog_allowance_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(_flag(name), value, "is greater than 0", "give a positive number or leave it out")
        if self.watchdog_factor != 0 and not self.watchdog_factor > 1:
            rule = "is greater than 1, or 0 for no watchdog"
            raise ConfigError("--watchdog-factor", self.watchdog_factor, rule, "use e.g. 10")
        if not self.watchdog_exit_factor >= 1:
            rule = "is 1 (end with the report) or more"
            raise ConfigError("--watchdog-exit-factor", self.watchdog_exit_factor, rule, "use e.g. 2")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
