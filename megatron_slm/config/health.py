"""What a run does about numbers that are wrong."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Loss spikes. (Steps whose losses or gradients are not finite are never applied: --max-skipped-steps.)"""

    loss_spike_sigmas: float | None = None
    """A step is a spike if its mean loss over valid tokens lies this many standard deviations above the mean of the
    steps before it (6 is usual); default: steps are not looked at."""
    loss_spike_window: int = 128
    """Steps that the mean and the deviation are of; spikes are looked for once half of them are there."""
    skip_loss_spikes: bool = False
    """Do not apply a spike's step; such steps count for --max-skipped-steps."""

    def __post_init__(self) -> None:
        sigmas, window = self.loss_spike_sigmas, self.loss_spike_window
        if sigmas is not None and not sigmas > 0:
            raise ConfigError("--loss-spike-sigmas", sigmas, "is greater than 0", "use e.g. 6")
        if window < 4:
            raise ConfigError("--loss-spike-window", window, "is 4 or more", "use e.g. 128")
        if self.skip_loss_spikes and sigmas is None:
            raise ConfigError(
                "--skip-loss-spikes", True, "goes with --loss-spike-sigmas, which says what a spike is", "add it"
            )
