"""Causal grouped-query attention.

Shapes: s sequence, b micro-batch, d hidden, h query heads held here, g key/value groups held here,
k width of a head.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_slm.config.architecture import Architecture
from megatron_slm.device import flash_attention_installed
from megatron_slm.model.layers import Layers
from megatron_slm.model.norm import RMSNorm
from megatron_slm.model.rope import rotate, rotation
from megatron_slm.types import Documents

FLASH_ATTENTION_WIDEST_HEAD = 256
"""Its kernels refuse wider heads."""


class Attention(nn.Module):
    """`softmax(Q K^T / sqrt(k)) V` over the positions before and including one's own (or a window of them)."""

    def __init__(self, arch: Architecture, layers: Layers, prefix: str, *, window: int | None) -> None:
        super().__init__()
        self.width, self.window = arch.kv_channels, window
        self.num_heads = layers.share(arch.num_attention_heads, field="num_attention_heads")
        self.num_groups = layers.share(arch.num_query_groups, field="num_query_groups")
        q, kv = arch.num_attention_heads * self.width, arch.num_query_groups * self.width
        self.qkv = layers.linear_in(
            prefix, arch.hidden_size, {"q_proj": q, "k_proj": kv, "v_proj": kv}, bias=arch.qkv_bias
        )
        self.o_proj = layers.linear_out(f"{prefix}o_proj", q, arch.hidden_size, bias=arch.attention_output_bias)
        norm = partial(RMSNorm, layers, hidden_size=self.width, epsilon=arch.norm_epsilon, over_heads=True)
        self.q_norm = norm(f"{prefix}q_norm") if arch.qk_norm else nn.Identity()
        self.k_norm = norm(f"{prefix}k_norm") if arch.qk_norm else nn.Identity()
        self.rope = (self.width, arch.rotary_base, tuple(sorted(arch.rope_scaling.items())))

    def forward(self, x_sbd: Tensor, documents: Documents | None = None) -> Tensor:
        """[s, b, d] to [s, b, d].

        Args:
            documents: what is kept apart; None for whole samples.
        """
        q_sbf, k_sbf, v_sbf = self.qkv(x_sbd)
        q_sbhk = self.q_norm(q_sbf.unflatten(-1, (self.num_heads, self.width)))
        k_sbgk = self.k_norm(k_sbf.unflatten(-1, (self.num_groups, self.width)))
        v_sbgk = v_sbf.unflatten(-1, (self.num_groups, self.width))

        cos, sin = rotation(q_sbhk.shape[0], *self.rope, x_sbd.device)
        if documents is not None and documents.position_bs is not None:
            position_sb = documents.position_bs.t()
            cos, sin = cos[position_sb, 0], sin[position_sb, 0]
        q_sbhk, k_sbgk = rotate(q_sbhk, cos, sin), rotate(k_sbgk, cos, sin)
        if documents is not None and documents.lengths is not None:
            out_sbhk = document_attention(q_sbhk, k_sbgk, v_sbgk, self.window, documents)
        else:
            out_sbhk = causal_attention(q_sbhk, k_sbgk, v_sbgk, self.window)
        return self.o_proj(out_sbhk.flatten(-2))


def causal_attention(q_sbhk: Tensor, k_sbgk: Tensor, v_sbgk: Tensor, window: int | None) -> Tensor:
    """Attention of every position to itself and those before it, [s, b, h, k].

    Args:
        window: positions seen, the own one included; None for all.
    """
    length = q_sbhk.shape[0]
    if _flash_attention_takes(q_sbhk):
        return _flash_attention(q_sbhk, k_sbgk, v_sbgk, window)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_sbhk, k_sbgk, v_sbgk))
    grouped = q.shape[1] != k.shape[1]
    if window is None or window >= length:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        seen = (distance >= 0) & (distance < window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3)


def document_attention(
    q_sbhk: Tensor, k_sbgk: Tensor, v_sbgk: Tensor, window: int | None, documents: Documents
) -> Tensor:
    """`causal_attention` inside each document by itself, [s, b, h, k]; no mask is made of the whole sample.

    Args:
        window: see `causal_attention`.
        documents: with `lengths`.
    """
    assert documents.lengths is not None, "documents that attention keeps apart have lengths"
    length, num_samples = q_sbhk.shape[:2]
    # one after the other: [s, b, heads, k] to [N, heads, k], samples outermost
    q_Nhk, k_Ngk, v_Ngk = (x.transpose(0, 1).flatten(0, 1) for x in (q_sbhk, k_sbgk, v_sbgk))
    if _flash_attention_takes(q_sbhk):
        out_Nhk = _flash_attention_varlen(q_Nhk, k_Ngk, v_Ngk, window, documents)
    else:
        parts = zip(*(x[:, None].split(documents.lengths) for x in (q_Nhk, k_Ngk, v_Ngk)), strict=True)
        out_Nhk = torch.cat([causal_attention(q, k, v, window) for q, k, v in parts]).squeeze(1)
    return out_Nhk.unflatten(0, (num_samples, length)).transpose(0, 1)


def _flash_attention_takes(q_sbhk: Tensor) -> bool:
    fits = q_sbhk.dtype in (torch.bfloat16, torch.float16) and q_sbhk.shape[-1] <= FLASH_ATTENTION_WIDEST_HEAD
    return q_sbhk.is_cuda and fits and flash_attention_installed()


def _flash_attention(q_sbhk: Tensor, k_sbgk: Tensor, v_sbgk: Tensor, window: int | None) -> Tensor:
    """The same through flash-attn's kernel, which takes grouped heads and windows as they are."""
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    q, k, v = (t.transpose(0, 1) for t in (q_sbhk, k_sbgk, v_sbgk))
    # its window counts the positions to the left of one's own
    out = flash_attn_func(q, k, v, causal=True, window_size=(-1 if window is None else window - 1, 0))
    return out.transpose(0, 1)


def _flash_attention_varlen(
    q_Nhk: Tensor, k_Ngk: Tensor, v_Ngk: Tensor, window: int | None, documents: Documents
) -> Tensor:
    """All documents in one call of flash-attn's kernel for sequences of several lengths."""
    from flash_attn import flash_attn_varlen_func

    assert documents.lengths is not None, "documents that attention keeps apart have lengths"
    ends, longest = documents.cumulative, max(documents.lengths)
    sides = (-1 if window is None else window - 1, 0)
    return flash_attn_varlen_func(q_Nhk, k_Ngk, v_Ngk, ends, ends, longest, longest, causal=True, window_size=sides)
