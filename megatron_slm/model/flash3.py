"""Attention through flash-attn 3's kernels: on Hopper GPUs, in bf16. The same two functions as in `sdpa.py`.

Its builds differ in whether they return the log-sum-exp beside the output.
"""

from __future__ import annotations

from torch import Tensor

from megatron_slm.model.flash import call_in_pieces, sides
from megatron_slm.types import Documents, Pieces


def attend(
    q_sbhk: Tensor, k_sbgk: Tensor, v_sbgk: Tensor, window: int | None, *, sparse_gradient: bool = False
) -> Tensor:
    """Like `sdpa.attend`; the kernel's backward pass runs on all rows."""
    from flash_attn_interface import flash_attn_func

    q, k, v = (t.transpose(0, 1) for t in (q_sbhk, k_sbgk, v_sbgk))
    return _output(flash_attn_func(q, k, v, causal=True, window_size=sides(window))).transpose(0, 1)


def attend_in_documents(
    q_Nhk: Tensor,
    k_Ngk: Tensor,
    v_Ngk: Tensor,
    window: int | None,
    documents: Documents,
    *,
    sparse_gradient: bool = False,
) -> Tensor:
    """Like `sdpa.attend_in_documents`; all documents in one call."""
    from flash_attn_interface import flash_attn_varlen_func

    assert documents.lengths is not None, "documents that attention keeps apart have lengths"
    ends, longest = documents.cumulative, max(documents.lengths)
    return _output(
        flash_attn_varlen_func(
            q_Nhk, k_Ngk, v_Ngk, ends, ends, longest, longest, causal=True, window_size=sides(window)
        )
    )


def attend_in_pieces(q_Mhk: Tensor, k_Ngk: Tensor, v_Ngk: Tensor, window: int | None, pieces: Pieces) -> Tensor:
    """Like `sdpa.attend_in_pieces`; all pieces in one call: the last query of each sees its last key."""
    from flash_attn_interface import flash_attn_varlen_func

    return _output(call_in_pieces(flash_attn_varlen_func, q_Mhk, k_Ngk, v_Ngk, window, pieces))


def _output(returned: Tensor | tuple[Tensor, ...]) -> Tensor:
    return returned if isinstance(returned, Tensor) else returned[0]
