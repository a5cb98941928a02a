"""Why a step is not applied, known from its losses before the optimizer's step."""

from __future__ import annotations

from typing import Literal

from megatron_slm.loss.objective import StepSettings
from megatron_slm.loss.sums import LossSums

Reason = Literal[
    "nonfinite-loss", "nonfinite-score", "nonfinite-gradient", "loss-spike", "nothing-kept", "no-trained-token"
]
"""All but `no-trained-token` are of bad steps; that one is of a batch whose tokens are all masked."""


def refusal(sums: LossSums, settings: StepSettings) -> Reason | None:
    """Why a step with these sums over the world must not be applied, the same on every rank; None where it may be.

    A loss of the model that is not finite comes from weights or activations that are not, whose gradient is worth
    nothing even where it happens to be finite. Without a kept token the gradient is zero, and applying it would still
    decay weights and move moments. (Gradients that are not finite are found by the optimizer itself.)
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
