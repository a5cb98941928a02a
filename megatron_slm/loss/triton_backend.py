"""The loss's element-wise operations as two Triton kernels, one program a row; no products (those are cuBLAS').

A block has at most `GPU_BLOCK_SIZE` columns, so a program holds its whole row in registers: every logit is read once
and written at most once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_slm.loss.row_statistics import RowStatistics


@triton.jit
def _fold(
    logits,
    exponentials,
    row_max,
    row_sum,
    row_target,
    row_moment,
    label_column,
    num_columns,
    logits_stride,
    exponentials_stride,
    KEEP: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < num_columns
    x = tl.load(logits + row * logits_stride + column, mask=inside, other=float("-inf"))
    old_max, old_sum = tl.load(row_max + row), tl.load(row_sum + row)
    new_max = tl.maximum(old_max, tl.max(x, axis=0))
    y = x - new_max
    e = tl.exp(y)
    shrink = tl.exp(old_max - new_max)
    tl.store(row_max + row, new_max)
    tl.store(row_sum + row, old_sum * shrink + tl.sum(e, axis=0))
    if ENTROPY:
        moved = tl.where(old_sum > 0, old_sum * (old_max - new_max), 0.0)  # the first block's shift is infinite
        moment = (tl.load(row_moment + row) + moved) * shrink + tl.sum(tl.where(inside, e * y, 0.0), axis=0)
        tl.store(row_moment + row, moment)
    label = tl.load(label_column + row)
    if (label >= 0) & (label < num_columns):
        tl.store(row_target + row, tl.load(logits + row * logits_stride + label))
    if KEEP:
        at = exponentials + row * exponentials_stride + column
        tl.store(at, e.to(exponentials.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    x,
    out,
    row_max,
    row_factor,
    label_column,
    label_gradient,
    num_columns,
    x_stride,
    out_stride,
    LOGITS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < num_columns
    factor = tl.load(row_factor + row)
    e = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(factor.dtype)  # arithmetic never in bf16
    if LOGITS:
        e = tl.exp(e - tl.load(row_max + row))
    label = tl.load(label_column + row).to(tl.int32)  # comparisons of 64 bits would take more registers
    gradient = tl.where(column == label, tl.load(label_gradient + row), e * factor)
    tl.store(out + row * out_stride + column, gradient.to(out.dtype.element_ty), mask=inside)


def num_warps(num_columns: int) -> int:
    """Warps of a program: 16 columns a thread at most, so that a row fits in its registers."""
    return 16 if num_columns > 4096 else 8


class TritonKernels:
    """`Kernels` in Triton."""

    name = "triton"

    def fold(self, logits_NB: Tensor, rows: RowStatistics, column_N: Tensor, exponentials_NB: Tensor | None) -> None:
        """Fold a block's logits into the rows' statistics, in place; arguments as in `Kernels.fold`."""
        num_rows, num_columns = logits_NB.shape
        kept_NB = logits_NB if exponentials_NB is None else exponentials_NB
        _fold[(num_rows,)](
            logits_NB,
            kept_NB,
            rows.max_N,
            rows.sum_N,
            rows.target_N,
            rows.sum_N if rows.moment_N is None else rows.moment_N,
            column_N,
            num_columns,
            logits_NB.stride(0),
            kept_NB.stride(0),
            KEEP=exponentials_NB is not None,
            ENTROPY=rows.moment_N is not None,
            TILE=triton.next_power_of_2(num_columns),
            num_warps=num_warps(num_columns),
        )

    def gradient(
        self,
        x_KB: Tensor,
        factor_K: Tensor,
        column_K: Tensor,
        target_K: Tensor,
        *,
        max_K: Tensor | None,
        out_KB: Tensor,
    ) -> None:
        """Compute the logits' gradients; arguments as in `Kernels.gradient`."""
        num_rows, num_columns = x_KB.shape
        if num_rows == 0:  # a grid of nothing cannot be launched
            return
        _gradient[(num_rows,)](
            x_KB,
            out_KB,
            factor_K if max_K is None else max_K,
            factor_K,
            column_K,
            target_K,
            num_columns,
            x_KB.stride(0),
            out_KB.stride(0),
            LOGITS=max_K is not None,
            TILE=triton.next_power_of_2(num_columns),
            num_warps=num_warps(num_columns),
        )
