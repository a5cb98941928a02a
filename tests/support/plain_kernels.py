"""The functions of flash-attn and apex that are called, with their makers' signatures, in torch's plain operations."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """[b, s, heads, width] to the same (flash_attn_interface.py)."""
    assert causal
    assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    repeats, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = (x.repeat_interleave(repeats, 2) for x in (k, v))
    distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
    seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
    scores = torch.einsum("bshk,bthk->bhst", q.float(), k.float()) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhst,bthk->bshk", weights, v.float()).to(q.dtype)


def flash3_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window_size: Any = (-1, -1)) -> Any:
    """flash-attn 3's, of the builds that return the log-sum-exp as well."""
    return flash_attn_func(q, k, v, causal=causal, window_size=window_size), q.new_zeros(1)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """[N, heads, width] to the same; document by document."""
    assert cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q.device == q.device
    assert isinstance(max_seqlen_q, int)
    if type(q) is not Tensor and q.is_cuda:  # of no values: one document of every token
        return flash_attn_func(q[None], k[None], v[None], causal=causal, window_size=window_size)[0]
    bounds = cu_seqlens_q.tolist()
    parts = [
        flash_attn_func(q[a:b][None], k[a:b][None], v[a:b][None], causal=causal, window_size=window_size)[0]
        for a, b in pairwise(bounds)
    ]
    return torch.cat(parts)


def fused_rms_norm_affine(x: Tensor, weight: Tensor, normalized_shape: Any, eps: float = 1e-6) -> Tensor:
    """apex' order of operations: the product with the weight before the cast."""
    assert tuple(normalized_shape) == tuple(weight.shape)
    scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (scaled * weight.float()).to(x.dtype)


class FusedAdam(torch.optim.AdamW):
    """apex.optimizers.FusedAdam by its arguments, torch's AdamW by its arithmetic."""

    def __init__(
        self, params: Any, *, lr: float, weight_decay: float = 0.0, adam_w_mode: bool = True, **rest: Any
    ) -> None:
        assert adam_w_mode
        super().__init__(params, lr=lr, weight_decay=weight_decay, **rest)
