"""Attention whose products of queries and keys have a soft cap: `cap * tanh(product / cap)`.

Torch's fused kernels have none, so that the products are tables of every pair of positions, on any device and in any
dtype; a query attends to the positions before it only, and documents are tables of their own.

Shapes: s sequence, b micro-batch, h query heads, g key/value groups, k width of a head, N = b * s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.model.cut_sequences import attend_piece_by_piece
from megatron_slm.model.sparse_attention import seen
from megatron_slm.types import Documents, Pieces


class CappedAttention:
    """The interface of `sdpa.py`, with a soft cap."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def attend(
        self, q_sbhk: Tensor, k_sbgk: Tensor, v_sbgk: Tensor, window: int | None, *, sparse_gradient: bool = False
    ) -> Tensor:
        """Attend as `sdpa.attend` does; the softmax is in fp32."""
        groups = k_sbgk.shape[2]
        q_sbgrk = q_sbhk.unflatten(2, (groups, q_sbhk.shape[2] // groups))
        product_bgrst = torch.einsum("sbgrk,tbgk->bgrst", q_sbgrk, k_sbgk) * q_sbhk.shape[-1] ** -0.5
        capped_bgrst = torch.tanh(product_bgrst / self.cap) * self.cap
        mask_st = seen(k_sbgk.shape[0], window, q_sbhk.device)[-q_sbhk.shape[0] :]
        wide = torch.promote_types(q_sbhk.dtype, torch.float32)
        share_bgrst = capped_bgrst.masked_fill(~mask_st, -torch.inf).softmax(-1, dtype=wide).to(q_sbhk.dtype)
        return torch.einsum("bgrst,tbgk->sbgrk", share_bgrst, v_sbgk).flatten(2, 3)

    def attend_in_documents(
        self,
        q_Nhk: Tensor,
        k_Ngk: Tensor,
        v_Ngk: Tensor,
        window: int | None,
        documents: Documents,
        *,
        sparse_gradient: bool = False,
    ) -> Tensor:
        """Attend as `sdpa.attend_in_documents` does."""
        assert documents.lengths is not None, "attention within documents needs their lengths"
        parts = zip(*(x[:, None].split(documents.lengths) for x in (q_Nhk, k_Ngk, v_Ngk)), strict=True)
        return torch.cat([self.attend(q, k, v, window) for q, k, v in parts]).squeeze(1)

    def attend_in_pieces(
        self, q_Mhk: Tensor, k_Ngk: Tensor, v_Ngk: Tensor, window: int | None, pieces: Pieces
    ) -> Tensor:
        """Attend as `sdpa.attend_in_pieces` does."""
        return attend_piece_by_piece(self.attend, q_Mhk, k_Ngk, v_Ngk, window, pieces)
