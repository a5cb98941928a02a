"""Soft caps of logits: `cap * tanh(logit / cap)`."""

from __future__ import annotations

from torch import Tensor


def cap_(logits: Tensor, cap: float | None) -> Tensor:
    """Cap logits in place; None caps none."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def slope_(capped: Tensor, cap: float) -> Tensor:
    """Turn capped logits into their derivatives with respect to the logits, in place.

    A logit that was lost to a smaller number's logarithm, -infinity, has the derivative at the cap, 0.
    """
    return capped.clamp_(-cap, cap).div_(cap).square_().neg_().add_(1.0)
