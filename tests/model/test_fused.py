"""Element-wise work that is compiled by itself: the functions, the gradients and the blocks of plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backends import Backends
from megatron_slm.config.recomputation import Granularity
from megatron_slm.model import fused, norm, rope
from megatron_slm.model.block import Block
from megatron_slm.model.row_sampling import BackwardRows
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.types import Documents

DRAW = torch.Generator()


@pytest.fixture(autouse=True)
def _drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    DRAW.manual_seed(0)
    monkeypatch.setattr(fused, "compiled", lambda function: function)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64).to(dtype)


def norms(dtype: torch.dtype) -> tuple[Any, ...]:
    return norm.normalize, fused.normalize, (drawn(6, 2, 24, dtype=dtype), drawn(24, dtype=dtype)), (1e-3,)


def norms_of_heads(dtype: torch.dtype) -> tuple[Any, ...]:
    """A part of one layer's output, as queries are: rows that do not follow each other in memory."""
    heads = drawn(6, 2, 40, dtype=dtype)[..., 8:].unflatten(-1, (4, 8))
    return norm.normalize, fused.normalize, (heads, drawn(8, dtype=dtype)), (1e-6,)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gates(dtype: torch.dtype) -> tuple[Any, ...]:
    return swiglu, fused.gate, drawn(6, 2, 40, dtype=dtype).split(20, dim=-1), ()


def rotations(dtype: torch.dtype) -> tuple[Any, ...]:
    angle = drawn(6, 2, 1, 4, dtype=torch.promote_types(dtype, torch.float32))
    return rope.rotate, fused.rotate, (drawn(6, 2, 3, 8, dtype=dtype),), (angle.cos(), angle.sin())


PIECES = [norms, norms_of_heads, gates, rotations]


def outcome(function: Callable[..., Tensor], inputs: Any, others: Any, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves, *others)
    grad = torch.linspace(-2, 3, out.numel(), dtype=torch.float64).view_as(out).bfloat16().to(dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("piece", PIECES)
def test_gradients_are_autograds(piece: Any) -> None:
    plain, ours, inputs, others = piece(torch.float64)
    expected = outcome(plain, inputs, others, torch.float64)
    torch.testing.assert_close(outcome(ours, inputs, others, torch.float64), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("piece", PIECES)
def test_bf16_is_rounded_once(piece: Any) -> None:
    """Never further from fp64 than autograd's own steps, each of which rounds, or than one rounding."""
    plain, ours, inputs, others = piece(torch.bfloat16)
    wide = [x.double() if isinstance(x, Tensor) else x for x in others]
    exact = outcome(plain, inputs, wide, torch.float64)
    found = outcome(ours, inputs, others, torch.bfloat16)
    stepwise = outcome(plain, inputs, others, torch.bfloat16)
    for right, one, other in zip(exact, found, stepwise, strict=True):
        assert one.dtype == torch.bfloat16
        error, allowed = (one - right).abs().max(), (other - right).abs().max()
        assert error <= max(allowed, 2**-8 * right.abs().max())


@pytest.mark.parametrize(("piece", "numbers"), [(norms, 12 * 24 + 24 + 12), (gates, 2 * 12 * 20), (rotations, 2 * 48)])
def test_what_is_kept_for_the_backward_pass(piece: Any, numbers: int) -> None:
    """A norm: its input, its weight and a number a row. The activation: its inputs. A rotation: cosines and sines."""
    _, ours, inputs, others = piece(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ours(*(x.detach().requires_grad_() for x in inputs), *others)
    assert sum(x.numel() for x in kept) == numbers


# ---- blocks --------------------------------------------------------------------------------------------------------

ARCH = Architecture(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    vocab_size=97, qk_norm=True, mlp_bias=True,
)  # fmt: skip
DOCUMENTS = Documents((5, 7, 12), torch.tensor([0, 5, 12, 24], dtype=torch.int32), torch.arange(24).view(2, 12) % 7)


def block_outcome(
    documents: Documents | None,
    rows: BackwardRows | None,
    *,
    fuses: bool,
    dtype: torch.dtype = torch.float64,
    recompute: Granularity | None = None,
) -> list[Tensor]:
    block = Block(ARCH, ParallelLayers(backends=Backends(fuses_elementwise=fuses)), 0).to(dtype)
    DRAW.manual_seed(3)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=DRAW)
    x_sbd = drawn(12, 2, 32, dtype=dtype).requires_grad_()
    y_sbd = block(x_sbd, documents, rows, recompute)
    y_sbd.backward(drawn(12, 2, 32, dtype=dtype))
    return [y_sbd.detach(), *(x.grad for x in (x_sbd, *block.parameters()) if x.grad is not None)]


def sampled(kind: Any) -> BackwardRows:
    return BackwardRows(kind=kind, share=lambda _: 0.5, key=(1, 2, 3))


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
def test_blocks_are_the_same(documents: Documents | None) -> None:
    cases: list[tuple[str | None, Granularity | None]] = [(None, None), ("kept", None)]
    cases += [("sampled", None), ("sampled", "full"), ("sampled", "selective"), (None, "selective")]
    for kind, recompute in cases:
        plain, ours = (
            block_outcome(documents, kind and sampled(kind), fuses=fuses, recompute=recompute)
            for fuses in (False, True)
        )
        assert len(ours) == 2 + 10
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_blocks_are_the_same_through_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another number of rows after the first ones, as sampled rows have; nothing falls back to plain torch."""
    monkeypatch.undo()
    fused.compiled.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    for documents in (None, DOCUMENTS):
        for share in (None, 0.5, 0.25, 0.75):
            rows = [
                None if share is None else BackwardRows(kind="sampled", share=lambda _, s=share: s, key=(1, 2, 3))
                for _ in (0, 1)
            ]
            plain = block_outcome(documents, rows[0], fuses=False, dtype=torch.float32)
            ours = block_outcome(documents, rows[1], fuses=True, dtype=torch.float32)
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 6
    assert not torch._dynamo.utils.counters["graph_break"]
