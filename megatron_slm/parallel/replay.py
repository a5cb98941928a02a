"""Linear layers for a backward pass alone: two products, and none forwards.

Shapes: R rows (all positions, or some), i inputs, o outputs of a layer's share held here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slm.parallel.collectives import all_gather_dim0
from megatron_slm.parallel.groups import TensorParallel


class KnownLinear(torch.autograd.Function):
    """`x W^T + b` whose results are known, one for each part of W's rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_oi: Tensor, bias_o: Tensor | None, rows_M: Tensor | None, *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        """The outputs as they are; with `rows_M`, the first one is of these rows of x alone."""
        ctx.save_for_backward(x, weight_oi, rows_M)
        ctx.has_bias = bias_o is not None
        return tuple(output.detach() for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, W and b."""
        x, weight_oi, rows_M = ctx.saved_tensors
        x_Ri = x.flatten(0, -2)
        first_Ro, *others = (grad.flatten(0, -2) for grad in grads)
        if rows_M is None:
            grad_Ro = _side_by_side([first_Ro, *others])
            grad_x, grad_weight = grad_Ro @ weight_oi, grad_Ro.t() @ x_Ri
            grad_bias = grad_Ro.sum(0) if ctx.has_bias else None
        else:
            width, first_Mo = first_Ro.shape[1], first_Ro
            other_Ro = _side_by_side(others)
            grad_x = other_Ro @ weight_oi[width:]
            grad_x.index_add_(0, rows_M, first_Mo @ weight_oi[:width])
            grad_weight = torch.empty_like(weight_oi)
            torch.mm(first_Mo.t(), x_Ri.index_select(0, rows_M), out=grad_weight[:width])
            torch.mm(other_Ro.t(), x_Ri, out=grad_weight[width:])
            grad_bias = torch.cat([first_Mo.sum(0), other_Ro.sum(0)]) if ctx.has_bias else None
        return grad_x.view_as(x), grad_weight, grad_bias, None, *(None for _ in grads)


class UnreadLinear(torch.autograd.Function):
    """`x W^T` summed over the ranks, whose result nobody reads: the backward pass of a linear out."""

    @staticmethod
    def forward(ctx: Any, x_Ri: Tensor, weight_oi: Tensor, tp: TensorParallel) -> Tensor:
        """Zeros; under sequence parallelism of this rank's part of the rows."""
        ctx.save_for_backward(x_Ri, weight_oi)
        ctx.tp = tp
        rows = len(x_Ri) // tp.size if tp.sequence_parallel else len(x_Ri)
        return x_Ri.new_zeros(()).expand(rows, len(weight_oi))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and W."""
        x_Ri, weight_oi = ctx.saved_tensors
        return *differentiate_linear_out(grads[0], weight_oi, ctx.tp, lambda _: x_Ri), None


def differentiate_linear_out(
    grad_Ro: Tensor, weight_oi: Tensor, tp: TensorParallel, inputs: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of x, [R, i], and of W, of `x W^T` summed over the ranks.

    Args:
        grad_Ro: under sequence parallelism of this rank's part of the rows.
        inputs: is called with the gradient of x, and returns x.
    """
    whole_Ro = all_gather_dim0(grad_Ro, tp) if tp.sequence_parallel else grad_Ro
    grad_Ri = whole_Ro @ weight_oi
    return grad_Ri, whole_Ro.t() @ inputs(grad_Ri)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Columns of all parts, [R, o] each, without a copy where the parts lie so in memory."""
    first, width = parts[0], 0
    for part in parts:
        follows = part.data_ptr() == first.data_ptr() + width * first.element_size()
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and follows and part.stride() == first.stride()):
            return torch.cat(list(parts), dim=1)
        width += part.shape[1]
    return first.as_strided((len(first), width), first.stride())
