"""The share of every sequence that a rank has, for attention: its own queries, and the keys and values of all.

Keys and values of whole sequences are memory only while attention runs. Their storage, of which attention's graph has
views, is emptied behind it and filled again, by another gather, before its backward pass: a block keeps those of its
own positions.

Shapes: s positions of a sample, l of them held here, b samples, g key/value groups, k width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_slm.parallel.collectives import all_gather_dim0, reduce_scatter_dim0
from megatron_slm.parallel.context import by_rank, in_sequence_order, stretches
from megatron_slm.parallel.groups import ContextParallel


class SequenceShare:
    """The positions of every sample that are held here, for attention; all of them by default."""

    def __init__(self, ranks: ContextParallel) -> None:
        self.ranks = ranks
        self.is_cut = ranks.size > 1

    def whole_length(self, held: int) -> int:
        """Return the positions of a sample of which `held` are here."""
        return held * self.ranks.size

    def stretches(self, length: int) -> tuple[range, ...]:
        """Return the runs of a sample's positions that are held here."""
        return stretches(length, self.ranks)

    def held(self, value_s: Tensor) -> Tensor:
        """Return what is held here of a value of every position, [s, ...] to [l, ...]."""
        if not self.is_cut:
            return value_s
        return torch.cat([value_s[run.start : run.stop] for run in self.stretches(len(value_s))])

    def over_whole(self, attend: Callable[[Tensor, Tensor], Tensor], k_lbgk: Tensor, v_lbgk: Tensor) -> Tensor:
        """Call a function of the keys and values of all positions, [s, b, g, k] each.

        Args:
            attend: may keep views of them for its backward pass; copies stay in memory.
        """
        own_2blgk = torch.stack([k_lbgk.transpose(0, 1), v_lbgk.transpose(0, 1)])
        whole_2bsgk = _Gather.apply(own_2blgk, self.ranks)
        k_bsgk, v_bsgk = whole_2bsgk.unbind(0)
        out = attend(k_bsgk.transpose(0, 1), v_bsgk.transpose(0, 1))
        if not out.requires_grad:
            return out
        out = _Refilled.apply(out, own_2blgk.detach(), whole_2bsgk.detach(), self.ranks)
        whole_2bsgk.untyped_storage().resize_(0)  # after hooks of saved tensors have seen it
        return out


def _gathered(own_2blgk: Tensor, ranks: ContextParallel, out: Tensor | None = None) -> Tensor:
    parts = all_gather_dim0(own_2blgk, ranks).unflatten(0, (ranks.size, 2))
    return in_sequence_order(parts, 2, ranks, out)


class _Gather(torch.autograd.Function):
    """Keys and values of all positions, in sequence order; the gradients of each rank's are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, own_2blgk: Tensor, ranks: ContextParallel) -> Tensor:
        ctx.ranks = ranks
        return _gathered(own_2blgk, ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_dim0(by_rank(grads[0], 2, ctx.ranks).flatten(0, 1), ctx.ranks), None


class _Refilled(torch.autograd.Function):
    """The identity on attention's result, whose backward pass fills the gathered keys and values again."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, own_2blgk: Tensor, whole_2bsgk: Tensor, ranks: ContextParallel) -> Tensor:
        ctx.ranks = ranks
        ctx.save_for_backward(own_2blgk, whole_2bsgk)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        own_2blgk, whole_2bsgk = ctx.saved_tensors
        whole_2bsgk.untyped_storage().resize_(whole_2bsgk.nbytes)
        _gathered(own_2blgk, ctx.ranks, out=whole_2bsgk.data)  # what it was: to autograd no other version
        return grads[0], None, None, None
