"""The linear layer that leaves the residual stream under sequence parallelism, and keeps this rank's part of it alone.

Autograd's own product of the gathered sequence would keep the whole sequence on every rank. This one keeps the part,
and gathers it again in the backward pass, while the gradient of the input is computed (Korthikanti et al. 2022, arXiv
2205.05198). Results and gradients have the same bits.

Shapes: R positions of the whole sequence, i inputs, o outputs of the layer's share held here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slm.parallel.collectives import (
    all_gather_dim0,
    outside_of_compiled_blocks,
    start_all_gather_dim0,
    start_reduce_scatter_dim0,
)
from megatron_slm.parallel.groups import TensorParallel


class GatheredLinear(torch.autograd.Function):
    """`gather(x) W^T + b` of a sequence cut over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_oi: Tensor, bias_o: Tensor | None, tp: TensorParallel) -> Tensor:
        """[s / size, b, i] to [s, b, o]."""
        ctx.save_for_backward(x, weight_oi)
        ctx.tp, ctx.has_bias = tp, bias_o is not None
        return F.linear(all_gather_dim0(x, tp), weight_oi, bias_o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, W and b: each collective runs beside the product that does not need it."""
        x, weight_oi = ctx.saved_tensors
        grad_Ro = grads[0].flatten(0, -2)
        whole, gathering = start_all_gather_dim0(x, ctx.tp)
        grad_whole = (grad_Ro @ weight_oi).view(whole.shape)
        gathering.wait()
        grad_x, scattering = start_reduce_scatter_dim0(grad_whole, ctx.tp)
        grad_weight = grad_Ro.t() @ whole.flatten(0, -2)
        grad_bias = grad_Ro.sum(0) if ctx.has_bias else None
        scattering.wait()
        return grad_x, grad_weight, grad_bias, None


def gathered_linear(x: Tensor, weight_oi: Tensor, bias_o: Tensor | None, tp: TensorParallel) -> Tensor:
    """`gather(x) W^T + b`: from this rank's positions [s / size, b, i] to all of them, [s, b, o]."""
    return outside_of_compiled_blocks(GatheredLinear.apply, x, weight_oi, bias_o, tp)
