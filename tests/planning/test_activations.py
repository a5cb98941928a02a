"""What a block is predicted to keep, against the tensors that autograd saves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backends import Backends
from megatron_slm.config.recomputation import Granularity
from megatron_slm.engine.offload import OffloadedActivations
from megatron_slm.model import fused
from megatron_slm.model.block import Block
from megatron_slm.model.rope import rotation
from megatron_slm.parallel import layers
from megatron_slm.parallel.collectives import gather_sequence
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.planning.activations import block_activations, capped_tables, offloaded_block
from megatron_slm.planning.known_models import KNOWN_MODELS
from megatron_slm.planning.layouts import Layout
from tests.support.masked_rows import RecordedRows
from tests.support.saved import alone_of, saved_bytes
from tests.support.world import run_world

LENGTH = 64
KINDS: tuple[Granularity | None, ...] = (None, "selective")
SHAPES = {
    "grouped, wide": {"hidden_size": 512, "ffn_hidden_size": 1792, "num_query_groups": 8},
    "as many keys": {"hidden_size": 512, "ffn_hidden_size": 1376, "num_query_groups": 16},
    "shared heads": {"hidden_size": 512, "ffn_hidden_size": 1792, "num_query_groups": 4},
    "narrow heads": {"hidden_size": 1024, "ffn_hidden_size": 2816, "num_query_groups": 8, "kv_channels": 32},
}


def architecture(shape: str) -> Architecture:
    values: dict[str, Any] = {"num_layers": 1, "num_attention_heads": 16, "kv_channels": 32, "vocab_size": 64}
    return Architecture(**{**values, **SHAPES[shape]})


def layout_of(tp: TensorParallel) -> Layout:
    return Layout(
        tensor=tp.size, pipeline=1, data=1, zero_stage=1, micro_batch_size=1, num_micro_batches=1,
        sequence_parallel=tp.sequence_parallel,
    )  # fmt: skip


def whole_sequence_is_kept(x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel) -> Tensor:
    return F.linear(gather_sequence(x, tp), weight, bias)


def measured(
    shape: str,
    dtype: torch.dtype,
    tp: TensorParallel,
    recompute: Granularity | None = None,
    *,
    fuses: bool = False,
) -> int:
    backends = Backends(fuses_elementwise=fuses)
    block = Block(architecture(shape), ParallelLayers(tp, backends=backends), 0).to(dtype)
    rows = LENGTH // tp.size if tp.sequence_parallel else LENGTH
    x_sbd = torch.randn(rows, 1, block.self_attn.qkv.weight.shape[1]).to(dtype).requires_grad_()
    tables = rotation(LENGTH, *block.self_attn.rope, x_sbd.device)  # all blocks share them
    return saved_bytes(lambda: block(x_sbd, None, None, recompute), besides=[*block.parameters(), *tables])


def test_copies_on_the_host() -> None:
    """Offloading copies a tensor as often as it is saved, and no weights."""
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for recompute in KINDS:
                block = Block(architecture(shape), ParallelLayers(), 0).to(dtype)
                x_sbd = torch.randn(LENGTH, 1, block.self_attn.qkv.weight.shape[1]).to(dtype).requires_grad_()
                context, copied = OffloadedActivations(block), []
                packs = context.pack_hook
                context.pack_hook = lambda x, packs=packs, copied=copied: (copied.append(packs(x)), copied[-1])[1]
                with context:
                    block(x_sbd, None, None, recompute)
                found = sum(p[1].nbytes for p in copied if not isinstance(p, Tensor))
                weights = [p for p in copied if isinstance(p, Tensor)]
                assert len(weights) == (6 if recompute is None else 0)
                layout, e = layout_of(TensorParallel()), dtype.itemsize
                predicted = offloaded_block(architecture(shape), layout, e=e, recompute=recompute) * LENGTH
                assert found == pytest.approx(predicted, rel=0.001), (shape, dtype, recompute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_of_capped_attention(dtype: torch.dtype) -> None:
    """A Gemma 2 block, without its activation function's inner results."""
    changes = {"attention_softcap": 50.0, "norm_placement": "around", "zero_centered_norms": True}
    arch, tp = replace(architecture("as many keys"), **changes), TensorParallel()
    block = Block(arch, ParallelLayers(tp), 0).to(dtype)
    x_sbd = torch.randn(LENGTH, 1, 512).to(dtype).requires_grad_()
    tables = rotation(LENGTH, *block.self_attn.rope, x_sbd.device)
    saved = saved_bytes(lambda: block(x_sbd), besides=[*block.parameters(), *tables])
    kept = block_activations(arch, layout_of(tp), e=dtype.itemsize).total
    predicted = (kept + capped_tables(arch, layout_of(tp), LENGTH)) * LENGTH
    assert saved == pytest.approx(predicted, rel=0.02)


def rank_main(size: int, sequence_parallel: bool) -> list[tuple[str, Granularity | None, int, float, int, int]]:
    tp = alone_of(size, sequence_parallel=sequence_parallel) if size > 1 else TensorParallel()
    found = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            real, layers.gathered_linear = layers.gathered_linear, whole_sequence_is_kept
            whole = measured(shape, dtype, tp)
            layers.gathered_linear = real
            of_others = 2 * dtype.itemsize * architecture(shape).hidden_size * LENGTH * (size - 1) // size
            for recompute in KINDS:
                kept = block_activations(architecture(shape), layout_of(tp), e=dtype.itemsize, recompute=recompute)
                name = f"{shape}, {dtype}, {recompute}"
                found.append(
                    (name, recompute, measured(shape, dtype, tp, recompute), kept.total * LENGTH, whole, of_others)
                )
    return found


@pytest.mark.parametrize(("size", "sequence_parallel"), [(1, False), (8, False), (8, True)])
def test_predicted_bytes_are_saved(size: int, sequence_parallel: bool) -> None:
    (found,) = run_world(rank_main, 1, size, sequence_parallel)
    for name, recompute, saved, predicted, whole, of_others in found:
        assert saved == pytest.approx(predicted, rel=0.001), name
        if sequence_parallel and recompute is None:
            assert whole - saved == of_others, f"{name}: two linear layers keep no other rank's part of their input"
        if sequence_parallel and recompute == "selective":
            assert saved < 0.32 * whole, name


def kept_for_some_rows(block: Block, x_sbd: Tensor) -> Tensor:
    """Run a block whose backward pass is sampled, and save what it keeps beside its graphs."""
    out = block(x_sbd, None, RecordedRows(0.5))
    attended, inner = out.grad_fn.kept
    for x in (attended.normed_sbd, *attended.qkv, attended.q_sbhk, attended.mixed_sbf, inner.y_sbd, *inner.gate_up):
        x.detach().requires_grad_().square()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_bytes_are_kept_for_some_rows(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        block = Block(architecture(shape), ParallelLayers(), 0).to(dtype)
        x_sbd = torch.randn(LENGTH, 1, block.self_attn.qkv.weight.shape[1]).to(dtype).requires_grad_()
        tables = rotation(LENGTH, *block.self_attn.rope, x_sbd.device)
        saved = saved_bytes(partial(kept_for_some_rows, block, x_sbd), besides=[*block.parameters(), *tables])
        kept = block_activations(architecture(shape), layout_of(TensorParallel()), e=dtype.itemsize, some_rows=True)
        assert saved == pytest.approx(kept.total * LENGTH, rel=0.001), shape


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.1-8b", "llama-2-70b"])
def test_keeping_the_part_alone_saves_a_third_and_more_at_eight_ranks(name: str) -> None:
    """Of usual models in bf16, by the bytes that the test above compares with saved tensors."""
    arch, layout = KNOWN_MODELS[name], layout_of(TensorParallel(size=8, sequence_parallel=True))
    kept = block_activations(arch, layout, e=2).total
    of_others = 2 * 2 * arch.hidden_size * 7 / 8
    assert of_others / (kept + of_others) > 0.35


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_elementwise_work_keeps_less(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "compiled", lambda function: function)
    for shape in SHAPES:
        arch, layout = architecture(shape), layout_of(TensorParallel())
        predicted = block_activations(arch, layout, e=dtype.itemsize, fused=True).total
        assert measured(shape, dtype, TensorParallel(), fuses=True) == pytest.approx(predicted * LENGTH, rel=0.001)
        assert predicted < 0.85 * block_activations(arch, layout, e=dtype.itemsize).total
