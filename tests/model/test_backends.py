"""The implementations of attention and norms agree; kernels that need a GPU are called as their makers say."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backends import Backends
from megatron_slm.model import block, flash, sdpa
from megatron_slm.model.block import Block, compile_blocks
from megatron_slm.model.norm import RMSNorm
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.types import Documents

ON_GPU = torch.cuda.is_available()


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def heads(length: int = 9, num_samples: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(length, num_samples, n, 8, generator=g).to(device, dtype) for n in (4, 2, 2))


def seen_bss(documents: Documents | None, length: int, num_samples: int, sides: tuple[int, int]) -> Tensor:
    """Which positions each one sees, by the plainest rule: [b, s, s]."""
    place = torch.arange(length)
    distance = place[:, None] - place
    seen = (distance >= 0) & ((distance <= sides[0]) | (sides[0] < 0))
    number_bs = torch.zeros(num_samples, length)
    if documents is not None:
        assert documents.lengths is not None
        counts = torch.tensor(documents.lengths)
        number_bs = torch.arange(len(counts)).repeat_interleave(counts).view(num_samples, length)
    return seen & (number_bs[:, :, None] == number_bs[:, None])


def masked_attention(q_bshk: Tensor, k_bsgk: Tensor, v_bsgk: Tensor, seen: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_bshk, k_bsgk, v_bsgk))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)
    return out.transpose(1, 2)


DOCUMENTS = Documents((4, 5, 2, 1, 6), torch.tensor([0, 4, 9, 11, 12, 18], dtype=torch.int32), None)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn's documented interface: [b, s, heads, width] or [N, heads, width], and (left, right) windows."""
    module = types.ModuleType("flash_attn")

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]) -> Tensor:
        assert causal
        assert q.shape[:2] == (2, 9)
        return masked_attention(q, k, v, seen_bss(None, 9, 2, window_size))

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, *, causal: bool, window_size: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        assert causal
        assert cu_seqlens_q is cu_seqlens_k
        assert cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == 6
        documents = Documents(tuple(cu_seqlens_q.diff().tolist()), cu_seqlens_q, None)
        seen = seen_bss(documents, 18, 1, window_size)
        return masked_attention(q[None], k[None], v[None], seen)[0]

    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.usefixtures("stand_in")
def test_flash_attention_is_called_as_it_wants(window: int | None) -> None:
    q, k, v = heads()
    torch.testing.assert_close(flash.attend(q, k, v, window), sdpa.attend(q, k, v, window))
    q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
    torch.testing.assert_close(
        flash.attend_in_documents(q, k, v, window, DOCUMENTS), sdpa.attend_in_documents(q, k, v, window, DOCUMENTS)
    )


@pytest.mark.parametrize("window", [None, 3])
def test_sdpa_against_a_mask(window: int | None) -> None:
    """The plainest attention there is: every pair, and a mask."""
    q, k, v = heads()
    sides = (-1 if window is None else window - 1, 0)
    expected = masked_attention(*(x.transpose(0, 1) for x in (q, k, v)), seen_bss(None, 9, 2, sides))
    torch.testing.assert_close(sdpa.attend(q, k, v, window), expected.transpose(0, 1))
    flat = [x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)]
    expected = masked_attention(*(x.transpose(0, 1) for x in (q, k, v)), seen_bss(DOCUMENTS, 9, 2, sides))
    torch.testing.assert_close(sdpa.attend_in_documents(*flat, window, DOCUMENTS), expected.flatten(0, 1))


@pytest.mark.skipif(not (ON_GPU and installed("flash_attn")), reason="flash-attn runs on GPUs")
@pytest.mark.parametrize("window", [None, 100])
def test_flash_attention_on_the_device(window: int | None) -> None:
    for attend, documents in ((lambda m, x: m.attend(*x, window), None), (None, (100, 156, 200, 56))):
        x = heads(256, 2, torch.bfloat16, "cuda")
        if documents is None:
            ours, theirs, exact = attend(flash, x), attend(sdpa, x), attend(sdpa, [t.float() for t in x])
        else:
            ends = torch.tensor([0, *documents]).cumsum(0).int().cuda()
            where = Documents(documents, ends, None)
            flat = [t.transpose(0, 1).flatten(0, 1) for t in x]
            ours, theirs = (m.attend_in_documents(*flat, window, where) for m in (flash, sdpa))
            exact = sdpa.attend_in_documents(*(t.float() for t in flat), window, where)
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-3


def norm(backend: Any, dtype: torch.dtype = torch.float32) -> RMSNorm:
    module = RMSNorm(ParallelLayers(backends=Backends(norm=backend)), "n", 24, 1e-3)
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    return module.to(dtype)


def test_apex_norm_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """apex.normalization.fused_layer_norm.fused_rms_norm_affine(input, weight, normalized_shape, eps)."""

    def fused_rms_norm_affine(x: Tensor, weight: Tensor, normalized_shape: Any, eps: float) -> Tensor:
        assert tuple(normalized_shape) == (24,)
        return torch.nn.functional.rms_norm(x, tuple(normalized_shape), weight, eps)

    module = types.ModuleType("apex.normalization.fused_layer_norm")
    module.fused_rms_norm_affine = fused_rms_norm_affine  # type: ignore[attr-defined]
    for name in ("apex", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "apex.normalization.fused_layer_norm", module)
    x = torch.randn(5, 2, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm("apex")(x), norm("torch")(x))


@pytest.mark.skipif(not (ON_GPU and installed("apex")), reason="apex runs on GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apex_norm_on_the_device(dtype: torch.dtype) -> None:
    x = torch.randn(64, 2, 24, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    exact = norm("torch").cuda()(x.float())
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (norm("apex", dtype).cuda()(x) - exact).abs().max() <= 4 * rounding


def test_compiled_blocks_are_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through dynamo and autograd's tracing; the code generator (inductor) has a slow test of its own."""
    monkeypatch.setattr(block, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    arch = Architecture(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
        vocab_size=97, qk_norm=True, sliding_window=5, full_attention_layers=1,
    )  # fmt: skip
    blocks = torch.nn.ModuleList(Block(arch, ParallelLayers(), index) for index in range(2))
    g = torch.Generator().manual_seed(0)
    for parameter in blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=g)
    x_sbd = torch.randn(12, 2, 32, generator=g)
    names = [name for name, _ in blocks.named_parameters()]

    def outcome() -> list[Tensor]:
        blocks.zero_grad()
        y = x_sbd
        for one in blocks:
            y = one(y)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in blocks.parameters())]  # type: ignore[union-attr]

    eager = outcome()
    compile_blocks(blocks)
    torch.testing.assert_close(outcome(), eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for each kind of block"
    assert not torch._dynamo.utils.counters["graph_break"]
    assert [name for name, _ in blocks.named_parameters()] == names
