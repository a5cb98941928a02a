"""Reasons to skip a step; most are decided from its losses before the optimizer's step."""

from __future__ import annotations

from typing import Literal

from megatron_slm.loss.objective import StepSettings
from megatron_slm.loss.sums import LossSums

SkipReason = Literal[
    "nonfinite-loss",
    "nonfinite-score",
    "nonfinite-gradient",
    "loss-spike",
    "gradient-norm",
    "nothing-kept",
    "no-trained-token",
]
"""All but `no-trained-token` are of bad steps; that one is of a batch whose tokens are all masked."""


def skip_reason(sums: LossSums, settings: StepSettings) -> SkipReason | None:
    """Return the reason to skip a step with these sums over the world, the same on every rank; None applies the step.

    A loss of the model that is not finite comes from weights or activations that are not: its gradient is worth nothing
    even where it happens to be finite. Without a kept token the gradient is zero, and a step would still decay weights
    and update moments. (The optimizer itself finds gradients that are not finite: `nonfinite-gradient`,
    and those whose norm exceeds its limit: `gradient-norm`.)
    """
    if sums.nonfinite_losses:
        return "nonfinite-loss"
    if not sums.kept_tokens:
        if sums.nothing_finite:
            return "nonfinite-score"
        return "nothing-kept" if sums.ranked_tokens else "no-trained-token"
    if settings.loss_limit is not None and sums.valid_loss > settings.loss_limit * sums.valid_tokens:
        return "loss-spike"
    return None
