"""Attention by torch's `scaled_dot_product_attention`, on any device and in any dtype.

On a GPU only fused kernels are allowed. Torch would otherwise take its `math` path where none of them applies, without
a word: 15 times the memory traffic and a [s, s] table a head (grouped heads with a window, grouped heads in fp32).

Shapes: s sequence, b micro-batch, h query heads, g key/value groups, k width of a head, N = b * s.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_slm.model.cut_sequences import attend_piece_by_piece
from megatron_slm.model.prefix_attention import PrefixAttention
from megatron_slm.model.sparse_attention import SparseAttention, seen
from megatron_slm.types import Documents, Pieces

FUSED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
"""Kernels that make no table of scores; torch prefers cuDNN's on Hopper and Blackwell, else flash-attn's."""
FUSED_OF_ANY_LENGTH = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
"""Without cuDNN, which plans some 30 ms for every new length: documents have a new one each."""
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_WIDEST_HEAD = 256


def attend(
    q_sbhk: Tensor,
    k_sbgk: Tensor,
    v_sbgk: Tensor,
    window: int | None,
    *,
    sparse_gradient: bool = False,
    kernels: Sequence[SDPBackend] = FUSED,
) -> Tensor:
    """Attend from every position to itself and the positions before it, [s, b, h, k].

    Queries of the last positions alone may be given: fewer than keys.

    Args:
        window: number of positions to attend to, including the current one; None for all.
        sparse_gradient: many rows of the result's gradient will be zero; on a CPU they cost nothing then.
        kernels: those allowed on a GPU.

    Raises:
        RuntimeError: on a GPU, no allowed kernel applies.
    """
    length = k_sbgk.shape[0]
    is_causal = window is None or window >= length
    if q_sbhk.is_cuda and not (is_causal and _flash_takes(q_sbhk)):  # the other kernels want as many groups as heads
        k_sbgk, v_sbgk = (x.repeat_interleave(q_sbhk.shape[2] // x.shape[2], dim=2) for x in (k_sbgk, v_sbgk))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_sbhk, k_sbgk, v_sbgk))
    grouped = q.shape[1] != k.shape[1]
    if sparse_gradient and not q.is_cuda:
        return SparseAttention.apply(q, k, v, None if is_causal else window).permute(2, 0, 1, 3)
    if is_causal and q.shape[2] < length:
        return _attend_behind(q, k, v, kernels).permute(2, 0, 1, 3)
    with _fused_only(q, kernels):
        if is_causal:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            mask = seen(length, window, q.device)[-q.shape[2] :]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3)


def _attend_behind(q: Tensor, k: Tensor, v: Tensor, kernels: Sequence[SDPBackend]) -> Tensor:
    """Causal attention of the last positions, [b, heads, positions, k] all."""
    if not q.is_cuda:
        return PrefixAttention.apply(q, k, v)
    if _flash_takes(q):  # causal attention of this kernel ends with the last key; it takes widths that 8 divides
        width = q.shape[-1]
        q, k, v = (F.pad(x, (0, -width % 8)) for x in (q, k, v))
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True, scale=width**-0.5)[0]
        return out[..., :width]
    mask = seen(k.shape[2], None, q.device)[-q.shape[2] :]
    with _fused_only(q, kernels):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def attend_in_documents(
    q_Nhk: Tensor,
    k_Ngk: Tensor,
    v_Ngk: Tensor,
    window: int | None,
    documents: Documents,
    *,
    sparse_gradient: bool = False,
) -> Tensor:
    """Attend within each document separately, [N, h, k], without a mask over whole samples.

    Args:
        documents: boundaries, with `lengths`.
    """
    assert documents.lengths is not None, "attention within documents needs their lengths"
    parts = zip(*(x[:, None].split(documents.lengths) for x in (q_Nhk, k_Ngk, v_Ngk)), strict=True)
    found = [attend(q, k, v, window, sparse_gradient=sparse_gradient, kernels=FUSED_OF_ANY_LENGTH) for q, k, v in parts]
    return torch.cat(found).squeeze(1)


def attend_in_pieces(q_Mhk: Tensor, k_Ngk: Tensor, v_Ngk: Tensor, window: int | None, pieces: Pieces) -> Tensor:
    """Attend within pieces of documents, [M, h, k]: from some positions of one to all of it before them."""
    return attend_piece_by_piece(partial(attend, kernels=FUSED_OF_ANY_LENGTH), q_Mhk, k_Ngk, v_Ngk, window, pieces)


def attend_by_definition(q_sbhk: Tensor, k_sbgk: Tensor, v_sbgk: Tensor, window: int | None) -> Tensor:
    """`attend` with a table of every pair: to compare kernels with."""
    k, v = (x.repeat_interleave(q_sbhk.shape[2] // x.shape[2], dim=2) for x in (k_sbgk, v_sbgk))
    length, width = q_sbhk.shape[0], q_sbhk.shape[-1]
    scores = torch.einsum("sbhk,tbhk->bhst", q_sbhk, k) / width**0.5
    scores = scores.masked_fill(~seen(length, window, scores.device), -torch.inf)
    return torch.einsum("bhst,tbhk->sbhk", scores.softmax(-1), v)


def _flash_takes(q: Tensor) -> bool:
    """Tell whether flash-attn's kernel, which takes grouped heads, computes in this dtype and width."""
    return q.dtype in _FLASH_DTYPES and q.shape[-1] <= _FLASH_WIDEST_HEAD


def _fused_only(q: Tensor, kernels: Sequence[SDPBackend]) -> AbstractContextManager[object]:
    """Forbid the math path on a GPU; fp64, for tests, has no other."""
    return sdpa_kernel(list(kernels)) if q.is_cuda and q.dtype != torch.float64 else nullcontext()
