"""A sampled backward pass of sequences that are cut over ranks, against one process with the rows that were drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.checkpoint.weights import fill_module
from megatron_slm.config.recomputation import Granularity
from megatron_slm.model.block import Block
from megatron_slm.parallel.context import cut_batch, positions
from megatron_slm.parallel.groups import (
    create_context_parallel_group,
    create_tensor_parallel_group,
    init_distributed,
)
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.shards import cut_range, parts_with_offsets
from megatron_slm.parallel.topology import Topology
from megatron_slm.types import Documents, MicroBatch
from tests.parallel.test_sampled_rows import OPTIONS, logical_tensors
from tests.support.masked_rows import (
    LENGTH,
    SAMPLES,
    RecordedRows,
    architecture,
    blocks,
    gradients,
    largest_error,
    problem,
)
from tests.support.models import StateDictSource
from tests.support.world import run_world

LENGTHS = (5, 7, 12, 3, 9)
SHARES = {"sampled": 0.4, "kept": 0.7, "whole": 1.0}


def documents() -> Documents:
    starts = torch.tensor([0, 5, 12, 24, 27, 36], dtype=torch.int32)
    return Documents(LENGTHS, starts, torch.cat([torch.arange(n) for n in LENGTHS]).view(SAMPLES, LENGTH))


def gathered(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts


def rank_main(
    kind: str, context_size: int, tensor_size: int, apart: bool, recompute: Granularity | None
) -> list[dict[str, Any]]:
    """One report for each set of options."""
    init_distributed()
    topology = Topology(tensor=tensor_size, context=context_size)
    tp = create_tensor_parallel_group(topology, sequence_parallel=tensor_size > 1, num_query_groups=[2])
    layers = ParallelLayers(tp, context=create_context_parallel_group(topology))
    return [report(kind, layers, apart, recompute, options) for options in OPTIONS.values()]


def report(
    kind: str, layers: ParallelLayers, apart: bool, recompute: Granularity | None, options: dict[str, Any]
) -> dict[str, Any]:
    arch, context, tp = architecture(num_layers=2, **options), layers.sequence_share.ranks, layers.tp
    whole, (x, grad) = blocks(arch), problem()
    with torch.no_grad():  # numbers that fp32 holds, in which weights are read
        for parameter in (p for block in whole for p in block.parameters()):
            parameter.copy_(parameter.float())
    source = StateDictSource(logical_tensors(whole, [p.detach() for block in whole for p in block.parameters()]))
    stack = [Block(arch, layers, index).double() for index in range(arch.num_layers)]
    for block in stack:
        fill_module(block, source)

    here = positions(LENGTH, context).chunk(tp.size)[tp.rank]
    mine = None
    if apart:
        zeros = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
        mine = cut_batch(MicroBatch(zeros, zeros, zeros.bool(), zeros[:, 0], documents=documents()), context).documents
    exact = {"documents": documents() if apart else None}
    rows_kind: Any = "kept" if kind == "kept" else "sampled"
    rows = RecordedRows(SHARES[kind], kind=rows_kind, is_bounded=False)
    out, found = gradients(stack, x[here], grad[here], rows, documents=mine, recompute=recompute)

    places = torch.cat(gathered(here))
    weights = []
    for index in range(arch.num_layers):
        weight_lb = rows.weights(index, len(here) * SAMPLES).view(len(here), SAMPLES)
        weights.append(torch.empty(LENGTH, SAMPLES, dtype=torch.float64))
        weights[-1][places] = torch.cat(gathered(weight_lb.double()))
    plain, _ = gradients(whole, x, grad, **exact)
    if kind == "kept":
        alone = RecordedRows(SHARES[kind], kind="kept")
        _, expected = gradients(whole, x, grad, alone, **exact)
        same_rows = all(
            torch.equal(w.flatten(), alone.weights(i, LENGTH * SAMPLES).double()) for i, w in enumerate(weights)
        )
    else:
        _, expected = gradients(whole, x, grad, weights=[w.flatten() for w in weights], **exact)
        same_rows = False
    wanted, errors = logical_tensors(whole, expected[1:]), {}
    for parameter, value in zip([p for block in stack for p in block.parameters()], found[1:], strict=True):
        dist.all_reduce(value, group=context.group)
        for part, offset in parts_with_offsets(parameter):
            theirs = cut_range(wanted[part.name], part, 0, part.numel).flatten()
            errors[part.name] = largest_error([value.flatten()[offset : offset + part.numel]], [theirs])
    return {
        "output": largest_error([out], [plain[here]]),
        "input": largest_error(found[:1], [expected[0][here]]),
        "parameters": max(errors.values()),
        "drawn": [len(rows.drawn[index].row_M) for index in range(arch.num_layers)],
        "same rows": same_rows,
        "weights": weights,
    }


@pytest.mark.parametrize(
    ("kind", "context", "tensor", "apart", "recompute"),
    [
        ("sampled", 2, 1, True, None),
        ("sampled", 2, 2, False, "full"),
        pytest.param("sampled", 3, 1, False, "selective", marks=pytest.mark.slow),
        pytest.param("sampled", 2, 1, True, "full", marks=pytest.mark.slow),
        pytest.param("sampled", 2, 2, True, None, marks=pytest.mark.slow),
        ("kept", 2, 1, True, "full"),
        pytest.param("kept", 3, 1, False, None, marks=pytest.mark.slow),
        pytest.param("whole", 3, 1, True, None, marks=pytest.mark.slow),
    ],
)
def test_ranks_together_have_the_masked_gradient(
    kind: str, context: int, tensor: int, apart: bool, recompute: Granularity | None
) -> None:
    for reports in zip(*run_world(rank_main, context * tensor, kind, context, tensor, apart, recompute), strict=True):
        for report in reports:
            assert report["output"] < 1e-12
            assert report["input"] < 1e-10
            assert report["parameters"] < 1e-10
        counts = [report["drawn"] for report in reports]
        if kind == "kept":
            assert all(report["same rows"] for report in reports)
            assert all(first == second for first, second in counts), "counted once"
            assert len({first for first, _ in counts}) > 1, "as many as there are: more on one rank than on another"
        else:
            rows = LENGTH * SAMPLES // (context * tensor)
            assert counts == [[-(-int(1000 * SHARES[kind]) * rows // 1000)] * 2] * len(counts)
            first, second = reports[0]["weights"]
            assert kind == "whole" or not torch.equal(first, second)


def test_every_part_of_a_sequence_has_its_own_draws() -> None:
    from megatron_slm.parallel.groups import ContextParallel, TensorParallel

    parts = [
        ParallelLayers(
            TensorParallel(size=2, rank=t, sequence_parallel=True), context=ContextParallel(size=3, rank=c)
        ).sequence_part
        for c in range(3)
        for t in range(2)
    ]
    assert parts == list(range(6))
    whole = ParallelLayers(TensorParallel(size=2, rank=1), context=ContextParallel(size=3, rank=2))
    assert whole.sequence_part == 2, "tensor-parallel ranks that hold the same rows draw the same"
