"""Attention by torch's `scaled_dot_product_attention`, on any device and in any dtype.

Shapes: s sequence, b micro-batch, h query heads, g key/value groups, k width of a head, N = b * s.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slm.types import Documents


def attend(q_sbhk: Tensor, k_sbgk: Tensor, v_sbgk: Tensor, window: int | None) -> Tensor:
    """Attend from every position to itself and the positions before it, [s, b, h, k].

    Args:
        window: number of positions to attend to, including the current one; None for all.
    """
    length = q_sbhk.shape[0]
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_sbhk, k_sbgk, v_sbgk))
    grouped = q.shape[1] != k.shape[1]
    if window is None or window >= length:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        seen = (distance >= 0) & (distance < window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3)


def attend_in_documents(
    q_Nhk: Tensor, k_Ngk: Tensor, v_Ngk: Tensor, window: int | None, documents: Documents
) -> Tensor:
    """Attend within each document separately, [N, h, k], without a mask over whole samples.

    Args:
        documents: boundaries, with `lengths`.
    """
    assert documents.lengths is not None, "attention within documents needs their lengths"
    parts = zip(*(x[:, None].split(documents.lengths) for x in (q_Nhk, k_Ngk, v_Ngk)), strict=True)
    return torch.cat([attend(q, k, v, window) for q, k, v in parts]).squeeze(1)
