"""Attention on a CPU whose backward pass skips the rows without a gradient.

Forwards it is torch's kernel, bit for bit. Backwards the rows of a sample that have a gradient are gathered into tiles,
and the kernel runs on a tile and the keys that it sees; a row of zeros would add nothing to any result.

Shapes: s sequence, b micro-batch, h query heads, g key/value groups, k width of a head; T rows of a tile, n keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ROWS = 64
"""Rows of a tile: all of them run on the keys that the last one sees; smaller tiles take more calls of the kernel."""
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SparseAttention(torch.autograd.Function):
    """Causal attention of [b, h, s, k] queries to [b, g, s, k] keys and values, [b, h, s, k]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Attend to all positions before, or to those of a window that ends at the current one."""
        mask = None if window is None else _additive(~seen(q.shape[2], window, q.device), q.dtype)
        out, sums_bhs = _forward(q, k, v, 0.0, window is None, attn_mask=mask)
        ctx.save_for_backward(q, k, v, out, sums_bhs)
        ctx.window = window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of queries, keys and values."""
        q, k, v, out, sums_bhs = ctx.saved_tensors
        (dout,) = grads
        num_samples = len(q)
        # rows of all samples one after the other, [M, h, k], each as it lies in [s, b, h, k]
        position_M, row_M, counts = _rows_with_gradient(dout)
        dout_M, q_M, out_M = (x.permute(2, 0, 1, 3).flatten(0, 1).index_select(0, row_M) for x in (dout, q, out))
        sums_Mh = sums_bhs.permute(2, 0, 1).flatten(0, 1).index_select(0, row_M)
        dq_M = torch.empty_like(q_M)
        dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for sample, rows, keys, mask_Tn in _tiles(position_M, counts, ctx.window, q.dtype):
            part = slice(sample, sample + 1)
            dout_T, q_T, out_T = (x[None, rows].transpose(1, 2) for x in (dout_M, q_M, out_M))
            dq_T, dk_n, dv_n = _backward(
                dout_T, q_T, k[part, :, keys], v[part, :, keys], out_T, sums_Mh[None, rows].transpose(1, 2),
                0.0, False, attn_mask=mask_Tn,
            )  # fmt: skip
            dq_M[rows] = dq_T[0].transpose(0, 1)
            dk[part, :, keys].add_(dk_n)
            dv[part, :, keys].add_(dv_n)
        dq_sbhk = q.new_zeros(q.shape[2], num_samples, *q_M.shape[1:])
        dq_sbhk.flatten(0, 1).index_add_(0, row_M, dq_M)
        return dq_sbhk.permute(1, 2, 0, 3), dk.to(k.dtype), dv.to(v.dtype), None


class _Tile(NamedTuple):
    sample: int
    rows: slice
    keys: slice
    mask_Tn: Tensor


def _rows_with_gradient(dout: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Positions [M] of the rows that have a gradient, sample by sample, their numbers in [s, b], and those of a sample.

    A row of NaN has one: NaN is not 0.
    """
    dout_sbf = dout.permute(2, 0, 1, 3).flatten(2)
    has_bs = ((dout_sbf.amax(-1) != 0) | (dout_sbf.amin(-1) != 0)).t()
    sample_M, position_M = has_bs.nonzero(as_tuple=True)
    return position_M, position_M * len(dout) + sample_M, has_bs.sum(1).tolist()


def _tiles(position_M: Tensor, counts: list[int], window: int | None, dtype: torch.dtype) -> Iterator[_Tile]:
    """Runs of a sample's rows, with the keys that any of them sees and the mask between the two."""
    positions = position_M.tolist()
    number_n = torch.arange(max(positions, default=-1) + 1)
    end = 0
    for sample, count in enumerate(counts):
        begin, end = end, end + count
        for start in range(begin, end, TILE_ROWS):
            rows = slice(start, min(start + TILE_ROWS, end))
            first, last = positions[rows.start], positions[rows.stop - 1]
            keys = slice(0 if window is None else max(0, first - window + 1), last + 1)
            hidden_Tn = _hidden(position_M[rows], number_n[keys], window)
            yield _Tile(sample, rows, keys, _additive(hidden_Tn, dtype))


def seen(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return the positions (columns) that each position (row) attends to, bool [s, s]."""
    position_s = torch.arange(length, device=device)
    return ~_hidden(position_s, position_s, window)


def _hidden(position_T: Tensor, key_n: Tensor, window: int | None) -> Tensor:
    """The keys after each position, and those before its window, bool [T, n]."""
    position_T1 = position_T[:, None]
    return key_n > position_T1 if window is None else (key_n > position_T1) | (key_n <= position_T1 - window)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
