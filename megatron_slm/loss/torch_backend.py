"""The loss's element-wise operations in plain PyTorch: the backend of the CPU, and the oracle of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.loss.row_statistics import RowStatistics


class TorchKernels:
    """`Kernels` in plain PyTorch."""

    name = "torch"

    def fold(self, logits_NB: Tensor, rows: RowStatistics, column_N: Tensor, exponentials_NB: Tensor | None) -> None:
        """Fold a block's logits into the rows' statistics, in place; arguments as in `Kernels.fold`."""
        inside_N, label_N1 = _labels(column_N, logits_NB.shape[1])
        rows.target_N.copy_(torch.where(inside_N, logits_NB.gather(1, label_N1).squeeze(1), rows.target_N))
        max_N = torch.maximum(rows.max_N, logits_NB.amax(1))
        shift_N = rows.max_N - max_N
        logits_NB.sub_(max_N[:, None])
        shrink_N = shift_N.exp()
        if rows.moment_N is not None:
            moved_N = torch.where(rows.sum_N > 0, rows.sum_N * shift_N, 0.0)  # the first block's shift is infinite
            rows.moment_N.add_(moved_N).mul_(shrink_N).add_((logits_NB.exp() * logits_NB).sum(1))
        rows.sum_N.mul_(shrink_N).add_(logits_NB.exp_().sum(1))
        rows.max_N.copy_(max_N)
        if exponentials_NB is not None:
            exponentials_NB.copy_(logits_NB)

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
        if x_KB.dtype != factor_K.dtype:
            x_KB = out_KB.copy_(x_KB) if out_KB.dtype == factor_K.dtype else x_KB.to(factor_K.dtype)
        if max_K is not None:
            x_KB.sub_(max_K[:, None]).exp_()
        x_KB.mul_(factor_K[:, None])
        inside_K, label_K1 = _labels(column_K, x_KB.shape[1])
        x_KB.scatter_(1, label_K1, torch.where(inside_K[:, None], target_K[:, None], x_KB.gather(1, label_K1)))
        if out_KB is not x_KB:
            out_KB.copy_(x_KB)


def _labels(column_N: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Tell which labels are in a block, bool [N], and a column to read for each, int64 [N, 1]; no wait."""
    inside_N = (column_N >= 0) & (column_N < num_columns)
    return inside_N, torch.where(inside_N, column_N, 0)[:, None]
