"""Causal attention of the last positions of a sequence on a CPU, without a table of which position sees which.

torch's kernel aligns the first query with the first key. So it runs twice, on the keys before the queries, which all of
them see, and on the square of the queries' own; the two results are put together by their log-sum-exps. Backwards the
kernel makes the scores again, and with the whole log-sum-exp its gradients are those of the whole.

Shapes: b samples, h query heads, g key/value groups, q queries, n keys, k width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class PrefixAttention(torch.autograd.Function):
    """Attention of [b, h, q, k] queries to [b, g, n, k] keys and values, of which the last q are their own."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to all keys up to the query's own."""
        split = k.shape[2] - q.shape[2]
        first, first_sums = _forward(q, k[:, :, :split], v[:, :, :split], 0.0, False)
        second, second_sums = _forward(q, k[:, :, split:], v[:, :, split:], 0.0, True)
        sums = torch.logaddexp(first_sums, second_sums)
        out = _share(first, first_sums, sums) + _share(second, second_sums, sums)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values."""
        q, k, v, out, sums = ctx.saved_tensors
        split = k.shape[2] - q.shape[2]
        parts = []
        for keys, causal in ((slice(0, split), False), (slice(split, None), True)):
            parts.append(_backward(grads[0], q, k[:, :, keys], v[:, :, keys], out, sums, 0.0, causal))
        (dq, dk, dv), (own_dq, own_dk, own_dv) = parts
        return dq + own_dq, torch.cat([dk, own_dk], dim=2), torch.cat([dv, own_dv], dim=2)


def _share(out: Tensor, sums: Tensor, whole: Tensor) -> Tensor:
    """A part's output times its share of the sum over all keys."""
    return (out * (sums - whole).exp().unsqueeze(-1)).to(out.dtype)
