"""Element-wise work with gradients written by hand against autograd's of the same functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_slm.model import elementwise
from megatron_slm.model.mlp import ACTIVATIONS
from megatron_slm.model.norm import normalize
from megatron_slm.model.rope import rotate


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows, the last one shorter."""
    monkeypatch.setattr(elementwise, "BLOCK_NUMBERS", 40)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outcome(function: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, drawn(*out.shape, seed=9).to(out.dtype))


def check(function: Callable[..., Tensor], plain: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """The same bits forwards in every dtype; autograd's gradients in fp64, and as precise as its own in others."""
    exact = outcome(plain, leaves)[1]
    for found, expected in zip(outcome(function, leaves)[1], exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = [x.to(dtype) for x in leaves]
        (out, found), (plain_out, others) = outcome(function, rounded), outcome(plain, rounded)
        assert torch.equal(out, plain_out)
        exact = outcome(plain, [x.double() for x in rounded])[1]
        for ours, theirs, reference in zip(found, others, exact, strict=True):
            assert ours.dtype == dtype
            error, limit = (float((x.double() - reference).norm() / reference.norm()) for x in (ours, theirs))
            assert error <= max(1.5 * limit, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(11, 16), (7, 3, 16), (2, 60)])
def test_norm(shape: tuple[int, ...]) -> None:
    leaves = [drawn(*shape), drawn(shape[-1], seed=1) + 1]
    check(lambda x, w: elementwise.Normalize.apply(x, w, 1e-5), lambda x, w: normalize(x, w, 1e-5), leaves)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 6])
def test_rotation(width: int, interleaved: bool, per_sample: bool) -> None:
    angle = drawn(5, 3 if per_sample else 1, 1, width // 2, seed=2).float()
    by_hand, unread = elementwise.rotations(interleaved=interleaved)
    plain = partial(rotate, cos=angle.cos(), sin=angle.sin(), interleaved=interleaved)
    x = drawn(5, 3, 2, 8)
    check(lambda x: by_hand(x, angle.cos(), angle.sin()), plain, [x])
    found = outcome(lambda x: unread(x, angle.cos(), angle.sin()), [x])[1]
    torch.testing.assert_close(found, outcome(plain, [x])[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [None, [0, 2, 3, 8]])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gate(dtype: torch.dtype, activation: str, rows: list[int] | None) -> None:
    """The parts of one layer's output, whose rows do not follow each other in memory."""
    gate_up = drawn(9, 24).to(dtype)
    gate, up = (x.detach().requires_grad_() for x in gate_up.split(12, dim=1))
    row_M = None if rows is None else torch.tensor(rows)
    taken = [x if row_M is None else x[row_M] for x in (gate, up)]
    expected = ACTIVATIONS[activation](taken[0]) * taken[1]
    limits = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    grad = drawn(*expected.shape, seed=9).to(dtype)
    found, parts = elementwise.differentiate_gate(grad, gate.detach(), up.detach(), activation, row_M)
    torch.testing.assert_close(found, expected.detach(), **limits)
    for ours, theirs in zip(parts, torch.autograd.grad(expected, [gate, up], grad), strict=True):
        theirs = theirs if row_M is None else theirs[row_M]
        torch.testing.assert_close(ours, theirs, **limits)
    assert parts[1].data_ptr() == parts[0].data_ptr() + 12 * gate.element_size(), "side by side"
