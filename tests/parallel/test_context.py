"""The cut of sequences: its parts are the whole, attention over them is attention, and a block keeps its share."""

from __future__ import annotations

import itertools
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import ConfigError, LayoutError
from megatron_slm.flags.load import parse
from megatron_slm.model import sdpa
from megatron_slm.model.block import Block
from megatron_slm.model.capped_attention import CappedAttention
from megatron_slm.model.cut_sequences import attend_from
from megatron_slm.model.rope import rotation
from megatron_slm.parallel.batches import check_lengths
from megatron_slm.parallel.context import (
    by_rank,
    cut_batch,
    held_rows,
    in_sequence_order,
    positions,
    stretches,
    whole_rows,
)
from megatron_slm.parallel.groups import ContextParallel, DataParallel
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.topology import Topology
from megatron_slm.planning.activations import block_activations
from megatron_slm.planning.layouts import Layout, candidate_layouts, configured_layout
from megatron_slm.planning.memory import OneForwardOneBackward, stage_memory
from megatron_slm.planning.planned_run import plan_run
from megatron_slm.types import Documents, MicroBatch
from tests.support.runs import flags, run_flags
from tests.support.saved import saved_bytes
from tests.support.world import run_world

LENGTH, SAMPLES = 32, 3
LENGTHS = (20, 12, 3, 5, 24, 32)
"""Of documents, sample by sample: at 4 ranks a stretch has 4 positions, so that four lie in three stretches or more."""


def documents(ranks: ContextParallel | None = None) -> Documents:
    starts = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    whole = Documents(LENGTHS, starts, torch.arange(SAMPLES * LENGTH).view(SAMPLES, LENGTH))
    if ranks is None:
        return whole
    zeros = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
    cut = cut_batch(MicroBatch(zeros, zeros, zeros.bool(), zeros[:, 0], documents=whole), ranks).documents
    assert cut is not None
    return cut


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_position_is_held_once_and_in_order(size: int) -> None:
    parts = [positions(LENGTH, ContextParallel(size=size, rank=rank)) for rank in range(size)]
    assert sorted(torch.cat(parts).tolist()) == list(range(LENGTH))
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    if size > 1:
        assert in_sequence_order(torch.stack(parts), 0, ContextParallel(size=size)).tolist() == list(range(LENGTH))
    whole = torch.arange(2 * LENGTH * 3).view(2, LENGTH, 3)
    cut = by_rank(whole, 1, ContextParallel(size=size))
    assert all(torch.equal(part, whole[:, held]) for part, held in zip(cut, parts, strict=True))
    seen = [sum(part.tolist()) for part in parts]  # keys that the queries see: the work of causal attention
    assert max(seen) == min(seen)


@pytest.mark.parametrize("data", [1, 3])
def test_tables_of_the_ranks_are_put_together_in_sequence_order(data: int) -> None:
    """As one process would have them: sample by sample, of one micro-batch after the other."""
    size, rows = 4, SAMPLES * LENGTH
    whole = torch.arange(2 * data * rows).view(2, data, rows)
    parts = [
        whole[:, d, held_rows(SAMPLES, LENGTH, ContextParallel(size=size, rank=c))]
        for d in range(data)
        for c in range(size)
    ]
    together = DataParallel(size=data * size) if data > 1 else ContextParallel(size=size)
    found = whole_rows(torch.stack(parts), SAMPLES, ContextParallel(size=size), together)
    assert torch.equal(found, whole.flatten(1))


def test_one_rank_may_hold_an_odd_number_of_positions() -> None:
    parts = torch.arange(2 * 14).view(2, 1, 14)
    assert torch.equal(whole_rows(parts, 2, ContextParallel(), DataParallel(size=2)), parts.movedim(0, 1).flatten(1))


def grads(out: Tensor, weight: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * weight).sum(), leaves)


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped"])
@pytest.mark.parametrize("apart", [False, True], ids=["whole samples", "documents apart"])
@pytest.mark.parametrize("window", [None, 5, 13])
@pytest.mark.parametrize("size", [2, 4])
def test_attention_of_the_parts_is_attention(size: int, window: int | None, apart: bool, capped: bool) -> None:
    """Outputs and gradients in fp64, of grouped heads."""
    kernels: Any = CappedAttention(2.0) if capped else sdpa
    torch.manual_seed(0)
    leaves = tuple(
        torch.randn(LENGTH, SAMPLES, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    if apart:
        rows = (x.transpose(0, 1).flatten(0, 1) for x in leaves)
        out = kernels.attend_in_documents(*rows, window, documents()).unflatten(0, (SAMPLES, LENGTH)).transpose(0, 1)
    else:
        out = kernels.attend(*leaves, window)
    weight = torch.randn_like(out)
    expected = grads(out, weight, leaves)
    parts, sums = [], [torch.zeros_like(x) for x in leaves]
    for rank in range(size):
        ranks = ContextParallel(size=size, rank=rank)
        held_s, runs = positions(LENGTH, ranks), stretches(LENGTH, ranks)
        q, k, v = leaves
        where = documents(ranks) if apart else None
        part = attend_from(runs, kernels.attend, kernels.attend_in_pieces, q[held_s], k, v, window, where)
        for total, found in zip(sums, grads(part, weight[held_s], leaves), strict=True):
            total += found
        parts.append(part.detach())
    whole = in_sequence_order(torch.stack(parts), 0, ContextParallel(size=size))
    assert torch.allclose(whole, out, atol=1e-13)
    for found, wanted in zip(sums, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)


def test_a_document_over_several_stretches_is_one_piece_in_each() -> None:
    pieces = documents(ContextParallel(size=4, rank=1)).pieces  # positions 4 to 8 and 24 to 28
    assert pieces is not None
    assert pieces.queries == (4, 4, 4, 4, 4, 4)  # the third sample's documents end at 3, 8 and 32: two of them are here
    assert pieces.keys == ((0, 8), (20, 8), (35, 5), (40, 20), (64, 8), (64, 28))
    assert pieces.cumulative_queries.tolist() == [0, 4, 8, 12, 16, 20, 24]
    assert pieces.cumulative_keys.tolist() == [0, 8, 16, 21, 41, 49, 77]
    assert pieces.key_K[16:21].tolist() == [35, 36, 37, 38, 39]


class Kept(NamedTuple):
    """Bytes that a block keeps on the last rank."""

    everything: int
    without_tables: int
    predicted: float


def kept_by_blocks(size: int, length: int) -> list[Kept]:
    """Of blocks with few keys and with as many as queries, in two dtypes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    context = ContextParallel(size=size, rank=size - 1, group=dist.group.WORLD)
    kinds = itertools.product((1, 4), (torch.float32, torch.bfloat16))
    return [kept_by_a_block(context, length, num_groups, dtype) for num_groups, dtype in kinds]


def kept_by_a_block(context: ContextParallel, length: int, num_groups: int, dtype: torch.dtype) -> Kept:
    arch = Architecture(
        num_layers=1, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4, num_query_groups=num_groups,
        kv_channels=16, vocab_size=64,
    )  # fmt: skip
    block = Block(arch, ParallelLayers(context=context), 0).to(dtype)
    x_sbd = torch.randn(length // context.size, 1, 64).to(dtype).requires_grad_()
    tables = rotation(length, *block.self_attn.rope, x_sbd.device)  # all blocks of whole sequences share them
    held = [block.self_attn.sequence_share.held(table) for table in tables]
    saved = saved_bytes(lambda: block(x_sbd), besides=[*block.parameters(), *tables])
    layout = Layout(
        tensor=1, pipeline=1, data=1, context=context.size, zero_stage=1, micro_batch_size=1, num_micro_batches=1,
        sequence_parallel=False,
    )  # fmt: skip
    own_tables = sum(x.numel() * 4 for x in held) if context.size > 1 else 0
    predicted = block_activations(arch, layout, e=dtype.itemsize).total
    return Kept(saved, saved - own_tables, predicted * length / context.size)


@pytest.mark.parametrize("length", [1024, pytest.param(32768, marks=pytest.mark.slow)])
def test_a_block_keeps_its_share_of_a_sequence(length: int) -> None:
    (whole,) = run_world(kept_by_blocks, 1, 1, length)
    (quarter,) = run_world(kept_by_blocks, 1, 4, length)
    assert len(whole) == len(quarter) == 4
    for one, part in zip(whole, quarter, strict=True):
        for kept in (one, part):
            assert kept.without_tables == pytest.approx(kept.predicted, rel=0.001)
        assert part.everything / one.everything <= 0.26


def config(**changes: Any) -> Any:
    return parse(flags(run_flags("corpus", "run", **changes)))[0]  # type: ignore[arg-type]


def test_what_cannot_be_cut_is_refused() -> None:
    odd = config(context_parallel_size=2, seq_length=18)
    with pytest.raises(
        LayoutError, match=r"--seq-length is 18: must be divisible by 2 x --context-parallel-size \(4\)"
    ):
        check_lengths(odd, Topology(context=2))
    halves = config(context_parallel_size=2, seq_length=12, tensor_model_parallel_size=4, sequence_parallel=True)
    with pytest.raises(LayoutError, match="--seq-length / --context-parallel-size"):
        check_lengths(halves, Topology(context=2, tensor=4))
    with pytest.raises(ConfigError, match="--compile-blocks is True: must be off with --context-parallel-size 2"):
        config(context_parallel_size=2, compile_blocks=True)


def test_the_planner_shares_sequences_too() -> None:
    whole, cut = (
        plan_run(config(seq_length=64, global_batch_size=8, context_parallel_size=size, micro_batch_size=1))
        for size in (1, 2)
    )
    one, layout = configured_layout(whole, 2), configured_layout(cut, 4)
    assert (layout.data, layout.context, layout.topology.copies) == (2, 2, 4)
    assert layout.flags()["context-parallel-size"] == 2
    assert {found.context for found in candidate_layouts(cut, 8, max_tensor=2)} == {2}
    memory = [
        stage_memory(run, its, OneForwardOneBackward(1, its.num_micro_batches))[0]
        for run, its in ((whole, one), (cut, layout))
    ]
    assert 0.45 < memory[1].activations / memory[0].activations < 0.55
    assert memory[1].optimizer == pytest.approx(memory[0].optimizer / 2, rel=0.01)
    with pytest.raises(LayoutError, match="--context-parallel-size is 2: must divide the number of GPUs, 3"):
        next(candidate_layouts(cut, 3, max_tensor=1))
