"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_slm.model.layers import Layers


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, the mean in fp32 (arXiv 1910.07467).

    The product with the weight is taken after the cast back to the input's dtype, as Hugging Face does.

    Args:
        over_heads: it norms heads, of which a share is held here, and not the residual stream.
    """

    def __init__(
        self, layers: Layers, name: str, hidden_size: int, epsilon: float, *, over_heads: bool = False
    ) -> None:
        super().__init__()
        self.weight = layers.replicated(f"{name}.weight", (hidden_size,))
        self.as_used = layers.on_head_share if over_heads else layers.on_sequence_shard
        self.epsilon = epsilon

    def forward(self, x_sbd: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        x_fp32 = x_sbd.float()
        scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.epsilon)
        return self.as_used(self.weight) * (x_fp32 * scale).to(x_sbd.dtype)
