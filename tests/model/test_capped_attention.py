"""Attention with a soft cap against its definition in fp64: windows, documents, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_slm.model.capped_attention import CappedAttention
from megatron_slm.types import Documents

CAP = 0.8
LENGTHS = (3, 8, 1)


def heads(seed: int, num_heads: int, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, 1, num_heads, 4, generator=generator, dtype=torch.float64).requires_grad_()


def by_definition(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """Pair by pair."""
    out = torch.empty_like(q)
    for head in range(q.shape[2]):
        group = head * k.shape[2] // q.shape[2]
        products = q[:, 0, head] @ k[:, 0, group].t() / 2.0
        shares = (CAP * torch.tanh(products / CAP)).masked_fill(~sees, -torch.inf).softmax(-1)
        out[:, 0, head] = shares @ v[:, 0, group]
    return out


@pytest.mark.parametrize("window", [None, 4, 30])
@pytest.mark.parametrize("in_documents", [False, True])
def test_outputs_and_gradients(window: int | None, in_documents: bool) -> None:
    q, k, v = heads(0, 4), heads(1, 2), heads(2, 2)
    row, column = torch.arange(12)[:, None], torch.arange(12)
    sees = (column <= row) & (row - column < (window or 12))
    if in_documents:
        document = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
        sees &= document[:, None] == document
        inputs = (x.squeeze(1) for x in (q, k, v))
        ends = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        found = CappedAttention(CAP).attend_in_documents(*inputs, window, Documents(LENGTHS, ends, None))[:, None]
    else:
        found = CappedAttention(CAP).attend(q, k, v, window)
    expected = by_definition(q, k, v, sees)
    assert (found - expected).abs().max() <= 1e-12
    weight = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    gradients = (torch.autograd.grad((x * weight).sum(), [q, k, v]) for x in (found, expected))
    for mine, exact in zip(*gradients, strict=True):
        assert (mine - exact).abs().max() <= 1e-12
