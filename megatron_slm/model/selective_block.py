"""A decoder block that keeps the results of its products, and computes everything else again in the backward pass.

Kept are the block's input, queries, keys and values, the residual stream after attention, and the two inner layers of
the feed-forward layer. Norms, rotation, attention's core and the gated activation run again; no matrix product does,
and under tensor parallelism no sum over ranks. Forwards and backwards it is the block, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slm.model.layers import HasParameters
from megatron_slm.types import Documents

if TYPE_CHECKING:
    from megatron_slm.model.block import Block


class SelectiveBlock(torch.autograd.Function):
    """The function of (block, documents, input, the block's parameters) described above."""

    @staticmethod
    def forward(ctx: Any, block: Block, documents: Documents | None, x_sbd: Tensor, *_: Tensor) -> Tensor:
        """[s, b, d] to [s, b, d]."""
        attention, mlp = block.self_attn, block.mlp
        qkv = attention.qkv(block.attention_norm(x_sbd))
        y_sbd = x_sbd + block.scaled(attention.o_proj(attention.mix(*qkv, documents=documents)))
        gate_up = mlp.gate_up(block.mlp_norm(y_sbd))
        ctx.block, ctx.documents = block, documents
        ctx.save_for_backward(x_sbd, y_sbd, *qkv, *gate_up)
        return y_sbd + block.scaled(mlp.down_proj(mlp.activate(*gate_up)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of the parameters: the second half's graph is gone before the first is made."""
        block, attention, mlp = ctx.block, ctx.block.self_attn, ctx.block.mlp
        x_sbd, y_sbd, *products = ctx.saved_tensors
        qkv, gate_up = products[:3], products[3:]
        found: dict[int, Tensor] = {}
        with torch.enable_grad():
            y_sbd = y_sbd.detach().requires_grad_()
            inner = mlp.gate_up.replay(block.mlp_norm(y_sbd), gate_up)
            out_Nd = block.scaled(mlp.down_proj.replay(mlp.activate(*inner).flatten(0, 1)))
        dy_sbd = _differentiate(out_Nd, grads[0], y_sbd, [block.mlp_norm, mlp], found)
        del inner, out_Nd
        with torch.enable_grad():
            x_sbd = x_sbd.detach().requires_grad_()
            replayed = attention.qkv.replay(block.attention_norm(x_sbd), qkv)
            mixed_sbf = attention.mix(*replayed, documents=ctx.documents)
            out_Nd = block.scaled(attention.o_proj.replay(mixed_sbf.flatten(0, 1)))
        dx_sbd = _differentiate(out_Nd, dy_sbd, x_sbd, [block.attention_norm, attention], found)
        return None, None, dx_sbd, *(found[id(p)] for p in block.parameters())


class _Residual(torch.autograd.Function):
    """`x + branch`, which nobody reads: its gradients reach x in autograd's order, of which rounding depends."""

    @staticmethod
    def forward(ctx: Any, x_sbd: Tensor, branch_sbd: Tensor) -> Tensor:
        return branch_sbd.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


def _differentiate(
    branch_Nd: Tensor, grad_sbd: Tensor, x_sbd: Tensor, modules: Sequence[HasParameters], found: dict[int, Tensor]
) -> Tensor:
    """The gradient of x, from that of `x + branch`; those of the modules' parameters are put down."""
    parameters = [p for module in modules for p in module.parameters()]
    with torch.enable_grad():
        out_sbd = _Residual.apply(x_sbd, branch_Nd.view_as(x_sbd))
    dx_sbd, *others = torch.autograd.grad(out_sbd, [x_sbd, *parameters], grad_sbd)
    found.update(zip(map(id, parameters), others, strict=True))
    return dx_sbd
