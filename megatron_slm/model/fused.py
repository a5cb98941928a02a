"""A block's element-wise work, each piece compiled by itself: for blocks that cannot be compiled as a whole.

A piece reads its inputs once and writes its results once, forwards and backwards, and keeps less than autograd would:
a norm its input and one number a row, the activation its two inputs, a rotation nothing. What is compiled are pure
functions of tensors, so that hooks, communication and sampled rows stay outside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slm.model.rope import rotate as rotate_in_steps

COMPILER = "inductor"
"""torch.compile's backend."""
_MOST_VARIANTS = 32
"""Of one function's compiled code: by precision, number of dimensions, model or reference, and changing shapes."""


@lru_cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a pure function of tensors, once for all that use it; a second shape gives code for any."""
    most = torch._dynamo.config.recompile_limit  # beyond which it would go on uncompiled
    torch._dynamo.config.recompile_limit = max(most, _MOST_VARIANTS)
    return torch.compile(function, backend=COMPILER)


def normalize(x: Tensor, weight_d: Tensor, epsilon: float) -> Tensor:
    """`norm.normalize` in one pass: [..., d] to the same shape."""
    return _Normalize.apply(x, weight_d, epsilon)


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` in one pass."""
    return _Gate.apply(gate, up)


def activate(gate: Tensor, up: Tensor) -> Tensor:
    """`gate` without a graph."""
    return compiled(gate_forward)(gate, up)


def activation_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the gate and of what it lets through."""
    return compiled(gate_backward)(grad, gate, up)


def rotate(x_sbhk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope.rotate` in one pass."""
    return _Rotate.apply(x_sbhk, cos, sin)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_d: Tensor, epsilon: float) -> Tensor:
        y, scale = compiled(norm_forward)(x, weight_d, epsilon)
        ctx.save_for_backward(x, weight_d, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return *compiled(norm_backward)(grads[0], *ctx.saved_tensors), None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return compiled(gate_forward)(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return compiled(gate_backward)(grads[0], *ctx.saved_tensors)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_sbhk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return compiled(rotate_in_steps)(x_sbhk, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return compiled(rotate_back)(grads[0], *ctx.saved_tensors), None, None


# ---- what is compiled: arithmetic in fp32 (or fp64) ------------------------------------------------------------------


def norm_forward(x: Tensor, weight_d: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the normalized rows, and each row's factor [..., 1] in fp32."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight_d * (wide * scale).to(x.dtype), scale


def norm_backward(grad: Tensor, x: Tensor, weight_d: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows and of the weight."""
    normed, wide = _wide(x) * scale, _wide(grad)
    scaled = wide * _wide(weight_d)
    inner = (scaled * normed).mean(-1, keepdim=True)
    grad_x = scale * (scaled - normed * inner)
    grad_weight_d = (wide * normed).flatten(0, -2).sum(0)
    return grad_x.to(x.dtype), grad_weight_d.to(weight_d.dtype)


def gate_forward(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    return F.silu(gate) * up


def gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the gate and of what it lets through; the activation is made again."""
    wide, wide_gate = _wide(grad), _wide(gate)
    share = torch.sigmoid(wide_gate)
    activated = wide_gate * share
    grad_gate = wide * _wide(up) * (share + activated * (1 - share))
    return grad_gate.to(gate.dtype), (wide * activated).to(up.dtype)


def rotate_back(grad_sbhk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate by the opposite angle: the gradient of a rotation."""
    return rotate_in_steps(grad_sbhk, cos, -sin)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
