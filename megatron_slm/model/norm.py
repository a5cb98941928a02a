"""Root-mean-square normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_slm.model import elementwise, fused
from megatron_slm.model.layers import Layers


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, the mean in fp32 (arXiv 1910.07467).

    Args:
        over_heads: normalizes this rank's heads instead of the residual stream.
        zero_centered: multiplies by 1 + weight.
    """

    def __init__(
        self,
        layers: Layers,
        name: str,
        hidden_size: int,
        epsilon: float,
        *,
        over_heads: bool = False,
        zero_centered: bool = False,
    ) -> None:
        super().__init__()
        self.weight = layers.replicated(f"{name}.weight", (hidden_size,))
        self.as_used = layers.on_head_share if over_heads else layers.on_sequence_shard
        self.epsilon = epsilon
        in_torch = fused.normalize if layers.backends.fuses_elementwise else normalize
        self.normalize = {"torch": in_torch, "apex": normalize_in_apex}[layers.backends.norm]
        if zero_centered:
            self.normalize = normalize_zero_centered

    def forward(self, x_sbd: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        return self.normalize(x_sbd, self.as_used(self.weight), self.epsilon)


class SharedRMSNorm(nn.Module):
    """`RMSNorm` over a width that the ranks share: each has a part of it, and of the weight."""

    def __init__(self, layers: Layers, name: str, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = layers.shared(f"{name}.weight", width)
        self.mean_over_shares, self.epsilon = layers.mean_over_shares, epsilon

    def forward(self, x_sbf: Tensor) -> Tensor:
        """[..., f] to [..., f]."""
        x_fp32 = x_sbf.to(torch.promote_types(x_sbf.dtype, torch.float32))
        square_sb1 = self.mean_over_shares(x_fp32.square().mean(-1, keepdim=True))
        return self.weight * (x_fp32 * torch.rsqrt(square_sb1 + self.epsilon)).to(x_sbf.dtype)


def run_by_hand(norm: nn.Module, x_sbd: Tensor) -> Tensor:
    """Run a norm, with a gradient written by hand where there is one: [..., d] to [..., d]."""
    if not isinstance(norm, RMSNorm) or norm.normalize is not normalize:
        return norm(x_sbd)
    return elementwise.Normalize.apply(x_sbd, norm.as_used(norm.weight), norm.epsilon)


def normalize(x_sbd: Tensor, weight_d: Tensor, epsilon: float) -> Tensor:
    """Normalize; multiplies by the weight after the cast back to the input's dtype, as Hugging Face does."""
    x_fp32 = x_sbd.to(torch.promote_types(x_sbd.dtype, torch.float32))  # fp64 keeps its own
    scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + epsilon)
    return weight_d * (x_fp32 * scale).to(x_sbd.dtype)


def normalize_zero_centered(x_sbd: Tensor, weight_d: Tensor, epsilon: float) -> Tensor:
    """Normalize and multiply by 1 + weight, in fp32 before the cast, as Hugging Face does."""
    x_fp32 = x_sbd.to(torch.promote_types(x_sbd.dtype, torch.float32))
    scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + epsilon)
    return (x_fp32 * scale * (1.0 + weight_d.to(x_fp32.dtype))).to(x_sbd.dtype)


def normalize_in_apex(x_sbd: Tensor, weight_d: Tensor, epsilon: float) -> Tensor:
    """Normalize in one fused kernel; multiplies by the weight before the cast, which rounds differently in bf16."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x_sbd, weight_d, weight_d.shape, epsilon)
