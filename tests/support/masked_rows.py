"""The oracle of a row-sampled backward pass: the whole block under autograd, with weighted gradient rows.

An identity on the block's output sends `w dZ` into the block and `dZ - w dZ` straight to its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.recomputation import Granularity
from megatron_slm.model.block import Block
from megatron_slm.model.row_sampling import BackwardRows, Drawn
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.types import Documents

LENGTH, SAMPLES, WIDTH = 12, 3, 32


class RecordedRows(BackwardRows):
    """Rows that are written down by block."""

    def __init__(self, share: float = 0.5, *, kind: Any = "sampled", key: tuple[int, ...] = (3,), **options: Any):
        super().__init__(kind=kind, share=lambda block: share, key=key, **options)
        object.__setattr__(self, "drawn", {})

    def draw(self, norm_N: Tensor, *, block: int, part: int) -> Drawn:
        self.drawn[block] = super().draw(norm_N, block=block, part=part)  # type: ignore[attr-defined]
        return self.drawn[block]  # type: ignore[attr-defined]

    def weights(self, block: int, num_rows: int) -> Tensor:
        """What each row of a block's gradient was multiplied by, [N]."""
        rows, weights = self.drawn[block]  # type: ignore[attr-defined]
        assert len(rows.unique()) == len(rows)
        return weights.new_zeros(num_rows).index_copy_(0, rows, weights)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_sbd: Tensor, x_sbd: Tensor, weight_N: Tensor) -> Tensor:
        ctx.weight_N = weight_N
        return z_sbd.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        weighted = grads[0] * ctx.weight_N.view(*grads[0].shape[:2], 1).to(grads[0].dtype)
        return weighted, grads[0] - weighted, None


def architecture(**options: Any) -> Architecture:
    values = {
        "num_layers": 3, "hidden_size": WIDTH, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
        "kv_channels": 8, "vocab_size": 17,
    }  # fmt: skip
    return Architecture(**{**values, **options})


def blocks(arch: Architecture, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Block]:
    """A stack with weights of a size that makes mistakes visible."""
    torch.manual_seed(seed)
    made = [Block(arch, ParallelLayers(), index).to(dtype) for index in range(arch.num_layers)]
    with torch.no_grad():
        for block in made:
            for parameter in block.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    return made


def problem(*, dtype: torch.dtype = torch.float64, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """An input, and a gradient of the output whose rows differ in size and are zero for two in five."""
    torch.manual_seed(1)
    x_sbd = torch.randn(LENGTH, SAMPLES, width, dtype=torch.float64)
    size_sb = torch.rand(LENGTH, SAMPLES, 1, dtype=torch.float64) ** 2
    grad_sbd = torch.randn_like(x_sbd) * size_sb * (torch.rand(LENGTH, SAMPLES, 1) < 0.6)
    return x_sbd.to(dtype), grad_sbd.to(dtype)


def gradients(
    stack: Sequence[Block],
    x_sbd: Tensor,
    grad_sbd: Tensor,
    rows: BackwardRows | None = None,
    *,
    documents: Documents | None = None,
    weights: Sequence[Tensor] | None = None,
    recompute: Granularity | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The stack's output, and the gradients of its input and of all parameters.

    Args:
        rows: choose the backward passes' rows; None is plain autograd.
        weights: of plain autograd's rows, by block.
        recompute: what the blocks compute again.
    """
    x_sbd = x_sbd.detach().requires_grad_()
    parameters = [p for block in stack for p in block.parameters()]
    out = x_sbd
    for index, block in enumerate(stack):
        below, out = out, block(out, documents, rows, recompute)
        if weights is not None:
            out = _Route.apply(out, below, weights[index])
    return out.detach(), list(torch.autograd.grad(out, [x_sbd, *parameters], grad_sbd))


def masked(stack: Sequence[Block], x_sbd: Tensor, grad_sbd: Tensor, rows: RecordedRows, **options: Any) -> list[Tensor]:
    """What `gradients` must be with the rows that were drawn."""
    num_rows = x_sbd.shape[0] * x_sbd.shape[1]
    weights = [rows.weights(index, num_rows) for index in range(len(stack))]
    return gradients(stack, x_sbd, grad_sbd, weights=weights, **options)[1]


def largest_error(some: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """Relative to the largest number of each tensor."""
    pairs = zip(some, others, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)
