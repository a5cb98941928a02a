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

TILE_ROWS = 128
"""Rows of a tile: the kernel's own blocks are of 32 to 256."""
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SparseAttention(torch.autograd.Function):
    """Causal attention of [b, h, s, k] queries to [b, g, s, k] keys and values, [b, h, s, k]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Attend to all positions before, or to those of a window that ends at the current one."""
        mask = None if window is None else _additive(seen(q.shape[2], window, q.device), q.dtype)
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
        dq = torch.zeros_like(q)
        dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for sample, row_T, keys, mask_Tn in _tiles(dout, ctx.window):
            part = slice(sample, sample + 1)
            dout_T, q_T, out_T = (x[part].index_select(2, row_T) for x in (dout, q, out))
            dq_T, dk_n, dv_n = _backward(
                dout_T, q_T, k[part, :, keys], v[part, :, keys], out_T, sums_bhs[part].index_select(2, row_T),
                0.0, False, attn_mask=mask_Tn,
            )  # fmt: skip
            dq[sample].index_copy_(1, row_T, dq_T[0])
            dk[part, :, keys] += dk_n
            dv[part, :, keys] += dv_n
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


class _Tile(NamedTuple):
    sample: int
    row_T: Tensor
    keys: slice
    mask_Tn: Tensor


def _tiles(dout: Tensor, window: int | None) -> Iterator[_Tile]:
    """Rows that have a gradient, with the keys that any of them sees and the mask between the two."""
    has_bs = dout.abs().amax(dim=(1, 3)) != 0  # NaN is not 0
    for sample, has_s in enumerate(has_bs):
        for row_T in has_s.nonzero().squeeze(1).split(TILE_ROWS):
            if len(row_T):
                first, last = int(row_T[0]), int(row_T[-1])
                start = 0 if window is None else max(0, first - window + 1)
                distance_Tn = row_T[:, None] - torch.arange(start, last + 1)
                yield _Tile(sample, row_T, slice(start, last + 1), _additive(_sees(distance_Tn, window), dout.dtype))


def seen(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return the positions (columns) that each position (row) attends to, bool [s, s]."""
    return _sees(torch.arange(length, device=device)[:, None] - torch.arange(length, device=device), window)


def _sees(distance: Tensor, window: int | None) -> Tensor:
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
