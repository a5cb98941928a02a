"""A sampled block's element-wise work, with gradients written by hand: fewer passes over memory than autograd's.

On a CPU it goes block of rows by block of rows, so that what one step writes the next one finds in the cache. Norm and
rotation give the results of the plain functions, bit for bit; everything else is as precise, and rounded
otherwise. `fused.py` has what is compiled.

Shapes: R rows, d hidden, f inner width, N rows of which M are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slm.model.rope import rotate

BLOCK_NUMBERS = 2**16
"""Numbers of a block of rows: a few such blocks fit into a core's cache."""


def row_blocks(x_Rd: Tensor) -> Iterator[slice]:
    """Cut rows into blocks on a CPU; elsewhere they are one."""
    rows = max(1, BLOCK_NUMBERS // x_Rd.shape[1]) if x_Rd.device.type == "cpu" else max(1, len(x_Rd))
    for start in range(0, len(x_Rd), rows):
        yield slice(start, min(start + rows, len(x_Rd)))


class Normalize(torch.autograd.Function):
    """`norm.normalize`: [..., d] to the same shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_d: Tensor, epsilon: float) -> Tensor:
        """Normalize x and multiply by the weight."""
        out, x_Rd = torch.empty_like(x, memory_format=torch.contiguous_format), x.flatten(0, -2)
        out_Rd, scale_R1 = out.view(x_Rd.shape), x.new_empty(len(x_Rd), 1, dtype=_wide_dtype(x))
        for rows in row_blocks(x_Rd):
            wide = x_Rd[rows].to(scale_R1.dtype)
            scale_R1[rows] = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
            torch.mul((wide * scale_R1[rows]).to(x.dtype), weight_d, out=out_Rd[rows])
        ctx.save_for_backward(x, weight_d, scale_R1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and of the weight."""
        x, weight_d, scale_R1 = ctx.saved_tensors
        x_Rd, grad_Rd, wide_weight_d = x.flatten(0, -2), grads[0].flatten(0, -2), weight_d.to(scale_R1.dtype)
        dx, dweight_d = torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(wide_weight_d)
        dx_Rd = dx.view(x_Rd.shape)
        for rows in row_blocks(x_Rd):
            scale, wide = scale_R1[rows], grad_Rd[rows].to(scale_R1.dtype)
            normed = x_Rd[rows].to(scale_R1.dtype) * scale
            product = wide * normed
            dweight_d += product.sum(0)
            inner = (product @ wide_weight_d)[:, None].mul_(scale / len(weight_d))
            torch.mul(wide, wide_weight_d, out=product).mul_(scale).addcmul_(normed, inner, value=-1)
            dx_Rd[rows] = product
        return dx, dweight_d.to(weight_d.dtype), None


def _active(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def differentiate_gate(
    grad_Mf: Tensor, gate_Nf: Tensor, up_Nf: Tensor, activation: str, row_M: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`activation(gate) * up` of some rows, or all, and its gradients for gate and up, side by side in memory.

    [M, f] each.
    """
    width, out_Mf = grad_Mf.shape[1], torch.empty_like(grad_Mf)
    dgate_Mf, dup_Mf = grad_Mf.new_empty(len(grad_Mf), 2 * width).split(width, dim=1)
    for rows in row_blocks(grad_Mf):
        grad, gate, up = grad_Mf[rows], *(_take(x, rows, row_M) for x in (gate_Nf, up_Nf))
        active = _active(gate, activation)
        torch.mul(active, up, out=out_Mf[rows])
        torch.mul(grad, active, out=dup_Mf[rows])
        through, out = grad * up, dgate_Mf[rows]
        if activation == "silu":
            torch.ops.aten.silu_backward.grad_input(through, gate, grad_input=out)
        else:
            torch.ops.aten.gelu_backward.grad_input(through, gate, approximate="tanh", grad_input=out)
    return out_Mf, (dgate_Mf, dup_Mf)


def _take(x_Nf: Tensor, rows: slice, row_M: Tensor | None) -> Tensor:
    return x_Nf[rows] if row_M is None else x_Nf.index_select(0, row_M[rows])


class UnreadRotation(torch.autograd.Function):
    """`rope.rotate` whose result nobody reads: it is x as it is, [..., heads, k]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """X, which takes the place of the rotated one."""
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of x."""
        return rotate_back(grads[0], *ctx.saved_tensors, interleaved=ctx.interleaved), None, None, None


class Rotate(UnreadRotation):
    """`rope.rotate`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """Rotate x."""
        UnreadRotation.forward(ctx, x, cos, sin, interleaved)
        return rotate(x, cos, sin, interleaved=interleaved)


def rotations(*, interleaved: bool) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...]:
    """`Rotate` and `UnreadRotation` as functions of x, cosine and sine."""
    return tuple(lambda *args, kind=kind: kind.apply(*args, interleaved) for kind in (Rotate, UnreadRotation))


def rotate_back(grad: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate by the opposite angle: the gradient of a rotation, [..., heads, k] to the same shape."""
    width = 2 * cos.shape[-1]
    wide = grad.to(_wide_dtype(grad))
    out = torch.empty_like(wide)
    if width < grad.shape[-1]:
        out[..., width:] = wide[..., width:]
    pairs = (slice(0, width, 2), slice(1, width, 2)) if interleaved else (slice(width // 2), slice(width // 2, width))
    (first, second), (out_first, out_second) = ([x[..., part] for part in pairs] for x in (wide, out))
    torch.mul(first, cos, out=out_first).addcmul_(second, sin)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=-1)
    return out.to(grad.dtype)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
