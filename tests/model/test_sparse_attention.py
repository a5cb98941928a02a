"""Attention that skips rows without a gradient equals attention by definition and by torch's kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_slm.model import sdpa, sparse_attention
from megatron_slm.types import Documents


def inputs(dtype: torch.dtype, *, groups: int, length: int = 70) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((length, 2, 4, 8), (length, 2, groups, 8), (length, 2, groups, 8))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def sparse_gradient_of(out: Tensor, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn_sb = torch.rand(out.shape[:2], generator=generator) < share
    drawn_sb[:, 1] &= torch.arange(out.shape[0]) > 9
    return torch.randn(out.shape, generator=generator, dtype=out.dtype) * drawn_sb[:, :, None, None]


@pytest.mark.parametrize("window", [None, 7, 70])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_gradients_are_those_of_the_definition(
    window: int | None, groups: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_attention, "TILE_ROWS", 16)
    qkv = inputs(torch.float64, groups=groups)
    out, exact = sdpa.attend(*qkv, window, sparse_gradient=True), sdpa.attend_by_definition(*qkv, window)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
    dout = sparse_gradient_of(out, share)
    for found, expected in zip(torch.autograd.grad(out, qkv, dout), torch.autograd.grad(exact, qkv, dout), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
def test_the_result_has_the_bits_of_torchs_kernel(dtype: torch.dtype, window: int | None) -> None:
    qkv = inputs(dtype, groups=2)
    assert torch.equal(sdpa.attend(*qkv, window, sparse_gradient=True), sdpa.attend(*qkv, window))


def test_sums_over_tiles_are_not_rounded_to_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_attention, "TILE_ROWS", 2)
    qkv = inputs(torch.bfloat16, groups=1, length=256)
    exact_qkv = [x.detach().double().requires_grad_() for x in qkv]
    out, exact = sdpa.attend(*qkv, None, sparse_gradient=True), sdpa.attend_by_definition(*exact_qkv, None)
    dout = sparse_gradient_of(out, 1.0)
    found = torch.autograd.grad(out, qkv, dout)
    expected = torch.autograd.grad(exact, exact_qkv, dout.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01


def test_documents_are_kept_apart() -> None:
    lengths = (10, 60, 33, 37)
    ends = torch.tensor([0, 10, 70, 103, 140], dtype=torch.int32)
    q, k, v = (x.detach().transpose(0, 1).flatten(0, 1).requires_grad_() for x in inputs(torch.float64, groups=2))
    documents = Documents(lengths, ends, None)
    found, expected = (
        sdpa.attend_in_documents(q, k, v, None, documents, sparse_gradient=sparse) for sparse in (True, False)
    )
    dout = torch.randn(found.shape, dtype=torch.float64) * (torch.arange(140) % 3 == 0)[:, None, None]
    for ours, theirs in zip(
        torch.autograd.grad(found, [q, k, v], dout), torch.autograd.grad(expected, [q, k, v], dout), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_row_that_is_not_finite_is_not_skipped() -> None:
    qkv = inputs(torch.float32, groups=2)
    out = sdpa.attend(*qkv, None, sparse_gradient=True)
    dout = torch.zeros_like(out)
    dout[3, 0, 0, 0] = float("nan")
    for grad in torch.autograd.grad(out, qkv, dout):
        assert not grad.isfinite().all()


def test_rows_without_a_gradient_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = sparse_attention._backward

    def counting(dout: Tensor, *rest: object, **named: object) -> object:
        rows.append(dout.shape[2])
        return real(dout, *rest, **named)

    monkeypatch.setattr(sparse_attention, "_backward", counting)
    qkv = inputs(torch.float32, groups=2)
    out = sdpa.attend(*qkv, None, sparse_gradient=True)
    dout = sparse_gradient_of(out, 0.3)
    torch.autograd.grad(out, qkv, dout)
    assert sum(rows) == int((dout != 0).any(-1).any(-1).sum()) < 70
