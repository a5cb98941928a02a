"""Configuration of the detection of loss spikes and of gradients that are too large."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.rules import require, require_given, require_positive


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Loss spikes, and gradients that are too large. (Steps with non-finite losses or gradients are always skipped; see
    --max-skipped-steps.)"""

    loss_spike_sigmas: float | None = None
    """Report a step as a spike if its mean loss over valid tokens exceeds the mean of the preceding steps by this many
    standard deviations; 6 is usual. Default: no detection."""
    loss_spike_window: int = 128
    """Number of preceding steps for the mean and the deviation. Detection starts when half of them are complete."""
    skip_loss_spikes: bool = False
    """Skip the update of spike steps. They count toward --max-skipped-steps."""
    grad_norm_skip_threshold: float | None = None
    """Skip the update of steps whose gradient norm, before clipping, exceeds this. They count toward
    --max-skipped-steps. Default: no limit."""

    def __post_init__(self) -> None:
        require_positive(self, "loss_spike_sigmas", "grad_norm_skip_threshold")
        require(self.loss_spike_window >= 4, self, "loss_spike_window", "be at least 4", "use e.g. 128")
        if self.skip_loss_spikes:
            fix = "add e.g. --loss-spike-sigmas 6, or remove --skip-loss-spikes"
            require_given(self.loss_spike_sigmas is not None, "loss_spike_sigmas", "--skip-loss-spikes", fix)
