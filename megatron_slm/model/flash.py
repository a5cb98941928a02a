"""Attention by flash-attn's kernels, on GPUs in bf16, with the interface of `sdpa.py`.

The kernels support grouped heads and windows; their window excludes the current position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from megatron_slm.types import Documents, Pieces

T = TypeVar("T")


def attend(
    q_sbhk: Tensor, k_sbgk: Tensor, v_sbgk: Tensor, window: int | None, *, sparse_gradient: bool = False
) -> Tensor:
    """Attend as `sdpa.attend` does; the kernel's backward pass runs on all rows."""
    from flash_attn import flash_attn_func

    q, k, v = (t.transpose(0, 1) for t in (q_sbhk, k_sbgk, v_sbgk))
    return flash_attn_func(q, k, v, causal=True, window_size=sides(window)).transpose(0, 1)


def attend_in_documents(
    q_Nhk: Tensor,
    k_Ngk: Tensor,
    v_Ngk: Tensor,
    window: int | None,
    documents: Documents,
    *,
    sparse_gradient: bool = False,
) -> Tensor:
    """Attend as `sdpa.attend_in_documents` does, with all documents in one call."""
    from flash_attn import flash_attn_varlen_func

    assert documents.lengths is not None, "attention within documents needs their lengths"
    ends, longest = documents.cumulative, max(documents.lengths)
    return flash_attn_varlen_func(
        q_Nhk, k_Ngk, v_Ngk, ends, ends, longest, longest, causal=True, window_size=sides(window)
    )


def attend_in_pieces(q_Mhk: Tensor, k_Ngk: Tensor, v_Ngk: Tensor, window: int | None, pieces: Pieces) -> Tensor:
    """Attend as `sdpa.attend_in_pieces` does, with all pieces in one call: the last query of each sees its last key."""
    from flash_attn import flash_attn_varlen_func

    return call_in_pieces(flash_attn_varlen_func, q_Mhk, k_Ngk, v_Ngk, window, pieces)


def call_in_pieces(
    function: Callable[..., T], q_Mhk: Tensor, k_Ngk: Tensor, v_Ngk: Tensor, window: int | None, pieces: Pieces
) -> T:
    """Call flash-attn's function of many lengths, or flash-attn 3's, with all pieces at once."""
    return function(
        q_Mhk,
        k_Ngk[pieces.key_K],
        v_Ngk[pieces.key_K],
        pieces.cumulative_queries,
        pieces.cumulative_keys,
        max(pieces.queries),
        max(count for _, count in pieces.keys),
        causal=True,
        window_size=sides(window),
    )


def sides(window: int | None) -> tuple[int, int]:
    """Positions seen to the left and to the right of one's own, as flash-attn counts them; -1 for all."""
    return (-1 if window is None else window - 1, 0)
