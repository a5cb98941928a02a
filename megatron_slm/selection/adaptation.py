"""Adaptation of the keep ratio to the losses of the kept tokens, after Ada-ESLM (arXiv 2505.19893).

The confidence level `a = 1 - keep ratio` moves against the mean loss of the kept tokens (the conditional value at
risk, where the score is the loss): `a <- a exp(-sensitivity * relative change of that loss over a step)`. While the
loss falls, fewer tokens are kept; when it rises, more.
"""

from __future__ import annotations

import math

RATIO_STEP = 2.0**-10
"""Grid of ratios, so that the last bits of a loss, which differ between layouts, rarely change a selection."""


def adapted(
    before: list[float], kept_loss: float, *, keep_ratio: float, sensitivity: float, least: float
) -> list[float]:
    """Return the keep ratio of the next step and the mean loss that it came from, as two numbers.

    Args:
        before: these numbers after the step before; empty in the first step.
        kept_loss: mean loss of the kept tokens of the step, in nats.
        keep_ratio: ratio of the first step.
        least: smallest ratio.
    """
    ratio, loss = before or (keep_ratio, kept_loss)
    change = (kept_loss - loss) / loss if loss > 0 else 0.0
    confidence = (1.0 - ratio) * math.exp(-sensitivity * change)
    ratio = round((1.0 - confidence) / RATIO_STEP) * RATIO_STEP
    return [min(1.0 - RATIO_STEP, max(least, ratio)), kept_loss]
