"""A sampled backward pass cut over tensor-parallel ranks, with and without sequence parallelism, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_slm.checkpoint.weights import fill_module
from megatron_slm.config.recomputation import Granularity
from megatron_slm.model.block import Block
from megatron_slm.parallel.groups import create_tensor_parallel_group, init_distributed
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.shards import cut_range, parts_with_offsets
from megatron_slm.parallel.topology import Topology
from tests.support.masked_rows import (
    LENGTH,
    SAMPLES,
    WIDTH,
    RecordedRows,
    architecture,
    blocks,
    gradients,
    largest_error,
    problem,
)
from tests.support.models import StateDictSource
from tests.support.world import run_world

OPTIONS = {
    "plain": {},
    "everything": {
        "qkv_bias": True,
        "mlp_bias": True,
        "attention_output_bias": True,
        "qk_norm": True,
        "sliding_window": 5,
    },
}
SHARE = 0.4


def logical_tensors(stack: list[Block], values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values of the parameters by the names of their logical tensors."""
    found = {}
    parameters = [p for block in stack for p in block.parameters()]
    for parameter, value in zip(parameters, values, strict=True):
        for part, offset in parts_with_offsets(parameter):
            found[part.name] = value.flatten()[offset : offset + part.numel].view(part.local_shape)
    return found


def rank_main(
    options: dict[str, Any], kind: str, sequence_parallel: bool, recompute: Granularity | None, size: int
) -> dict[str, Any]:
    init_distributed()
    tp = create_tensor_parallel_group(Topology(tensor=size), sequence_parallel=sequence_parallel, num_query_groups=[2])
    arch = architecture(num_layers=2, **options)
    whole, (x, grad) = blocks(arch), problem()
    with torch.no_grad():  # numbers that fp32 holds, in which weights are read
        for parameter in (p for block in whole for p in block.parameters()):
            parameter.copy_(parameter.float())
    source = StateDictSource(logical_tensors(whole, [p.detach() for block in whole for p in block.parameters()]))
    layers = ParallelLayers(tp)
    stack = [Block(arch, layers, index).double() for index in range(arch.num_layers)]
    for block in stack:
        fill_module(block, source)
    share = 0.7 if kind == "kept" else SHARE
    rows, whole_rows = RecordedRows(share, kind=kind), RecordedRows(share, kind=kind)
    if sequence_parallel:
        x, grad = (t.chunk(size)[tp.rank] for t in (x, grad))
    out, found = gradients(stack, x, grad, rows, recompute=recompute)
    x, grad = problem()
    num_rows = LENGTH * SAMPLES // (size if sequence_parallel else 1)
    weights = [rows.weights(index, num_rows) for index in range(2)]
    if sequence_parallel:
        parts = [[torch.empty_like(w) for _ in range(size)] for w in weights]
        for mine, both in zip(weights, parts, strict=True):
            dist.all_gather(both, mine)
        weights = [torch.cat(both) for both in parts]
    plain, _ = gradients(whole, x, grad)
    if kind == "kept":
        _, expected = gradients(whole, x, grad, whole_rows)
    else:
        _, expected = gradients(whole, x, grad, weights=weights)
    if sequence_parallel:
        plain, expected[0] = plain.chunk(size)[tp.rank], expected[0].chunk(size)[tp.rank]
    wanted = logical_tensors(whole, expected[1:])
    mine = {}
    for parameter, value in zip([p for block in stack for p in block.parameters()], found[1:], strict=True):
        for part, offset in parts_with_offsets(parameter):
            mine[part.name] = (
                value.flatten()[offset : offset + part.numel].view(part.local_shape),
                cut_range(wanted[part.name], part, 0, part.numel).view(part.local_shape),
            )
    return {
        "output": largest_error([out], [plain]),
        "input": largest_error(found[:1], expected[:1]),
        "parameters": {name: largest_error([a], [b]) for name, (a, b) in mine.items()},
        "rows": {index: drawn.row_M.tolist() for index, drawn in rows.drawn.items()},
        "width": x.shape[-1] == WIDTH,
    }


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize(
    ("kind", "sequence_parallel", "size"),
    [("sampled", False, 2), ("sampled", True, 2), ("kept", False, 2), ("sampled", True, 4)],
    ids=["tp", "sp", "kept", "shared-heads"],
)
def test_ranks_together_have_the_masked_gradient(
    kind: str, sequence_parallel: bool, size: int, recompute: Granularity | None
) -> None:
    for options in OPTIONS.values():
        reports = run_world(rank_main, size, options, kind, sequence_parallel, recompute, size)
        one, other, *_ = reports
        for report in reports:
            assert report["output"] < 1e-12
            assert report["input"] < 1e-10
            assert max(report["parameters"].values()) < 1e-10, report["parameters"]
        if not sequence_parallel:
            assert one["rows"] == other["rows"]
        else:
            assert len(one["rows"][0]) == len(other["rows"][0]) == {2: 8, 4: 4}[size]  # ceil(0.4 x 18), of 9
            assert one["rows"] != other["rows"]
