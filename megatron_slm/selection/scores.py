"""What tokens are ranked by."""

from __future__ import annotations

from torch import Tensor


def excess_loss(token_loss_N: Tensor, reference_loss_N: Tensor) -> Tensor:
    """Token loss minus reference loss, signed, in nats (Rho-1, equation 3): high where there is more to learn."""
    return token_loss_N - reference_loss_N
