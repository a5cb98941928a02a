"""A decoder block whose backward pass runs on some of the gradient rows.

Forwards it is the block, bit for bit. Backwards, with gradient rows dZ and a draw of rows R with weights w:

- the feed-forward layer, the output projection, the queries' projection and their norms run on `w * dZ` of R;
- attention gives gradients to the queries of R and to **all** keys and values, whose projections run on all rows; on a
  CPU, where sequences are whole, it runs on the queries of R alone;
- the residual stream passes dZ on as it is: `dX = dZ + (what R's branches add)`.

Given dZ, all of this is linear in the weighted rows, and these are on average dZ; so the gradient is an unbiased
estimate of the exact one, at any depth. With the kind `kept`, R are the rows that have a gradient at all, the weights
are 1, and the keys and values of all others are taken as constants: biased, and as cheap as it gets.

Shapes: N rows of the residual stream held here, M of them drawn; under sequence parallelism attention and the
feed-forward layer see the rows of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from megatron_slm.config.recomputation import Granularity
from megatron_slm.model.layers import HasParameters, LinearOut
from megatron_slm.model.norm import run_by_hand
from megatron_slm.model.row_sampling import BackwardRows, Drawn
from megatron_slm.types import Documents

if TYPE_CHECKING:
    from megatron_slm.model.attention import Angles
    from megatron_slm.model.block import Block


class _Attended(NamedTuple):
    """The first half of a block, with the graphs that its backward pass goes through."""

    x_sbd: Tensor
    """The block's input, a leaf."""
    normed_sbd: Tensor
    qkv: tuple[Tensor, ...]
    """Queries, keys and values before norms and rotation, [s, b, heads * k] each; keys and values are leaves."""
    q_sbhk: Tensor
    """Queries after norms and rotation, a leaf."""
    angles: Angles | None
    """Of the rotation."""
    mixed_sbf: Tensor
    """Output of attention, before its projection."""


class _Inner(NamedTuple):
    """Second half of a block, as it is kept for the backward pass."""

    y_sbd: Tensor
    """Input of the feed-forward layer."""
    gate_up: tuple[Tensor, ...]


class SampledBlock(torch.autograd.Function):
    """The function of (block, documents, rows, what to recompute, input, the block's parameters) described above."""

    @staticmethod
    def forward(
        ctx: Any,
        block: Block,
        documents: Documents | None,
        rows: BackwardRows,
        recompute: Granularity | None,
        x_sbd: Tensor,
        *_: Tensor,
    ) -> Tensor:
        """[s, b, d] to [s, b, d]."""
        # a graph that will be made again is not offloaded
        hooks = nullcontext() if recompute is None else saved_tensors_hooks(_itself, _itself)
        with hooks:
            attended = _attend(block, x_sbd, documents)
        y_sbd = block.scaled(block.self_attn.o_proj(attended.mixed_sbf)).add_(x_sbd)
        gate_up = block.mlp.gate_up(block.mlp_norm(y_sbd))
        ctx.block, ctx.documents, ctx.rows, ctx.recompute = block, documents, rows, recompute
        if recompute is None:  # plain attributes: the graphs inside hold their own tensors
            ctx.kept = attended, _Inner(y_sbd, gate_up)
        elif recompute == "selective":
            ctx.save_for_backward(x_sbd, *attended.qkv, y_sbd, *gate_up)
        else:
            ctx.save_for_backward(x_sbd)
        return block.scaled(block.mlp.down_proj(block.mlp.activate(*gate_up))).add_(y_sbd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of the parameters."""
        attended, inner = _kept(ctx)
        passed = _Pass(ctx.block, attended, inner)
        dx_sbd = passed.run(grads[0], ctx.rows)
        return None, None, None, None, dx_sbd, *(passed.found[id(p)] for p in ctx.block.parameters())


def _itself(x: Tensor) -> Tensor:
    return x


def _kept(ctx: Any) -> tuple[_Attended, _Inner | None]:
    """Complete what the forward pass left: without the second half where that is made again of the rows alone."""
    if ctx.recompute is None:
        assert ctx.kept is not None, "one backward pass for a forward pass"
        kept, ctx.kept = ctx.kept, None  # the backward pass lets go of it
        return kept
    x_sbd, *products = ctx.saved_tensors
    if not products:
        return _attend(ctx.block, x_sbd, ctx.documents), None
    *qkv, y_sbd = products[:4]
    return _attend(ctx.block, x_sbd, ctx.documents, qkv), _Inner(y_sbd, tuple(products[4:]))


def _attend(
    block: Block, x_sbd: Tensor, documents: Documents | None, projected: Sequence[Tensor] | None = None
) -> _Attended:
    """Run a block's first half.

    Args:
        projected: queries, keys and values where they are known.
    """
    attention = block.self_attn
    with torch.enable_grad():
        x_sbd = x_sbd.detach().requires_grad_()
        normed_sbd = run_by_hand(block.attention_norm, x_sbd)
    with torch.no_grad():
        q_sbf, k_sbf, v_sbf = attention.qkv(normed_sbd) if projected is None else projected
        angles = attention.angles(len(q_sbf), documents, q_sbf.device)
        q_sbhk = attention.query_heads(q_sbf, angles, attention.rotate).detach()
    with torch.enable_grad():
        k_sbf, v_sbf = (part.detach().requires_grad_() for part in (k_sbf, v_sbf))
        heads = attention.key_value_heads(k_sbf, v_sbf, angles, attention.rotate_by_hand)
        q_sbhk.requires_grad_()
        mixed_sbf = attention.core(q_sbhk, *heads, documents=documents, sparse_gradient=True)
    return _Attended(x_sbd, normed_sbd, (q_sbf.detach(), k_sbf, v_sbf), q_sbhk, angles, mixed_sbf)


class _Pass:
    """One backward pass through a block; `found` has its parameters' gradients by identity."""

    def __init__(self, block: Block, attended: _Attended, inner: _Inner | None) -> None:
        self.block, self.attended, self.inner = block, attended, inner
        self.found: dict[int, Tensor] = {}

    def run(self, dz_sbd: Tensor, rows: BackwardRows) -> Tensor:
        """The gradient of the block's input from that of its output."""
        block, dz_Nd = self.block, dz_sbd.flatten(0, 1)
        norm_N = torch.linalg.vector_norm(dz_Nd, dim=1, dtype=_wide(dz_Nd))
        drawn = rows.draw(block.layers.agreed(norm_N), block=block.index, part=block.layers.sequence_part)
        whole_M = block.layers.whole_rows(drawn.row_M, len(dz_Nd))
        dz_Md = dz_Nd.index_select(0, drawn.row_M)
        weighted_Md = (dz_Md.to(_wide(dz_Md)) * drawn.weight_M[:, None].to(_wide(dz_Md))).to(dz_Md.dtype)
        branches_Md = self._feed_forward(weighted_Md, drawn.row_M, whole_M)
        dqkv = self._attention(weighted_Md + branches_Md, whole_M)
        if rows.kind == "kept":
            dx_Nd = dz_Nd.clone()
            branches_Md = branches_Md + self._projections_of_rows(dqkv, drawn)
        else:
            dx_Nd = self._projections(dqkv, whole_M).flatten(0, 1).add_(dz_Nd)
        return dx_Nd.index_add_(0, drawn.row_M, branches_Md).view_as(dz_sbd)

    def _feed_forward(self, dz_Md: Tensor, row_M: Tensor, whole_M: Tensor) -> Tensor:
        """The gradient of the feed-forward layer's input, without the residual stream's."""
        block, mlp = self.block, self.block.mlp
        if self.inner is None:  # made again, of these rows alone
            mixed_Mf = _rows(self.attended.mixed_sbf.detach(), whole_M)
            y_Md = _rows(self.attended.x_sbd.detach(), row_M) + block.scaled(block.self_attn.o_proj(mixed_Mf))
        else:
            y_Md = _rows(self.inner.y_sbd, row_M)
        with torch.enable_grad():
            y_Md.requires_grad_()
            normed_Md = run_by_hand(block.mlp_norm, y_Md)
        if self.inner is None:
            with torch.no_grad():
                gate, up = mlp.gate_up(normed_Md)
            taken_M = None
        else:
            gate, up = (x.flatten(0, 1) for x in self.inner.gate_up)
            taken_M = whole_M
        dgate_up: tuple[Tensor, ...] = ()

        def active(dactive_Mf: Tensor) -> Tensor:
            nonlocal dgate_up
            active_Mf, dgate_up = mlp.differentiate_activation(dactive_Mf, gate, up, taken_M)
            return active_Mf

        self._linear_out(mlp.down_proj, dz_Md, active)
        with torch.enable_grad():
            replayed = mlp.gate_up.replay(normed_Md, dgate_up)
        (dy_Md,) = self._differentiate(replayed, dgate_up, [y_Md], [block.mlp_norm, mlp.gate_up])
        return dy_Md

    def _attention(self, dy_Md: Tensor, whole_M: Tensor) -> list[Tensor]:
        """Gradients of the queries of the rows, [M, h * k], and of all keys and values, [s, b, g * k] each."""
        attention, attended, mixed_sbf = self.block.self_attn, self.attended, self.attended.mixed_sbf
        dmixed_Mf = self._linear_out(attention.o_proj, dy_Md, lambda _: _rows(mixed_sbf.detach(), whole_M))
        dmixed_Nf = dmixed_Mf.new_zeros(mixed_sbf.shape).flatten(0, 1).index_add_(0, whole_M, dmixed_Mf)
        leaves, norms = [attended.q_sbhk, *attended.qkv[1:]], [attention.whole_k_norm, attention.k_norm]
        dq_sbhk, *others = self._differentiate([mixed_sbf], [dmixed_Nf.view_as(mixed_sbf)], leaves, norms)
        return [self._queries(_rows(dq_sbhk, whole_M), whole_M), *others]

    def _queries(self, dq_Mhk: Tensor, whole_M: Tensor) -> Tensor:
        """Gradients of the rows' queries as they were projected, [M, h * k]."""
        attention, angles = self.block.self_attn, self.attended.angles
        if angles is not None:
            cos, sin = (x.expand(*self.attended.q_sbhk.shape[:2], *x.shape[2:]) for x in angles)
            angles = _rows(cos, whole_M)[:, None], _rows(sin, whole_M)[:, None]
        with torch.enable_grad():
            q_Mf = _rows(self.attended.qkv[0], whole_M).requires_grad_()
            q_M1hk = attention.query_heads(q_Mf[:, None], angles, attention.rotate_unread)
        norms = [attention.whole_q_norm, attention.q_norm]
        (dq_Mf,) = self._differentiate([q_M1hk], [dq_Mhk[:, None]], [q_Mf], norms)
        return dq_Mf

    def _projections(self, dqkv: Sequence[Tensor], whole_M: Tensor) -> Tensor:
        """The part of the input's gradient that comes from queries of the rows, and all keys and values."""
        block, attended = self.block, self.attended
        with torch.enable_grad():
            qkv = block.self_attn.qkv.replay(attended.normed_sbd, dqkv, whole_M)
        (dx_sbd,) = self._differentiate(qkv, dqkv, [attended.x_sbd], [block.attention_norm, block.self_attn.qkv])
        return dx_sbd

    def _projections_of_rows(self, dqkv: Sequence[Tensor], drawn: Drawn) -> Tensor:
        """The same with keys and values of all other rows as constants, [M, d]."""
        block, is_kept_M1 = self.block, (drawn.weight_M > 0)[:, None]
        of_rows = [dqkv[0], *(_rows(grad, drawn.row_M) for grad in dqkv[1:])]
        grads = [grad.masked_fill(~is_kept_M1, 0.0) for grad in of_rows]
        with torch.enable_grad():
            x_Md = _rows(self.attended.x_sbd.detach(), drawn.row_M).requires_grad_()
            qkv = block.self_attn.qkv.replay(run_by_hand(block.attention_norm, x_Md), grads)
        (dx_Md,) = self._differentiate(qkv, grads, [x_Md], [block.attention_norm, block.self_attn.qkv])
        return dx_Md

    def _linear_out(self, linear: LinearOut, dout_Md: Tensor, inputs: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient of a layer's inputs; those of its parameters are put down."""
        dinputs_Mf, found = linear.differentiate(self.block.scaled(dout_Md), inputs)
        self.found.update(zip(map(id, linear.parameters()), found, strict=True))
        return dinputs_Mf

    def _differentiate(
        self,
        outputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        leaves: Sequence[Tensor],
        modules: Sequence[HasParameters],
    ) -> list[Tensor]:
        """Gradients of the leaves; those of the modules' parameters are put down."""
        parameters = [p for module in modules for p in module.parameters()]
        found = torch.autograd.grad(outputs, [*leaves, *parameters], grads)
        self.found.update(zip(map(id, parameters), found[len(leaves) :], strict=True))
        return list(found[: len(leaves)])


def _rows(x: Tensor, row_M: Tensor) -> Tensor:
    """Some rows of [s, b, ...], [M, ...]."""
    return x.flatten(0, 1).index_select(0, row_M)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
