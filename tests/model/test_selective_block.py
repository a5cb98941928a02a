"""Blocks that keep the results of their products alone: autograd's bits, and the bytes that they save."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_slm.model.block import Block
from megatron_slm.parallel.groups import create_tensor_parallel_group, init_distributed
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.topology import Topology
from megatron_slm.types import Documents
from tests.model.test_sampled_block import DOCUMENTS, OPTIONS
from tests.support.masked_rows import architecture, blocks, gradients, problem
from tests.support.world import run_world


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_bits_are_autograds(name: str, documents: Documents | None, dtype: torch.dtype) -> None:
    stack, (x, grad) = blocks(architecture(**OPTIONS[name]), dtype=dtype), problem(dtype=dtype)
    plain, exact = gradients(stack, x, grad, documents=documents)
    out, found = gradients(stack, x, grad, documents=documents, recompute="selective")
    assert torch.equal(out, plain)
    assert all(torch.equal(one, other) for one, other in zip(found, exact, strict=True))


def rank_main(options: dict[str, Any], sequence_parallel: bool) -> list[bool]:
    init_distributed()
    tp = create_tensor_parallel_group(Topology(tensor=2), sequence_parallel=sequence_parallel)
    arch, (x, grad) = architecture(num_layers=2, **options), problem(dtype=torch.float32)
    torch.manual_seed(3)
    stack = [Block(arch, ParallelLayers(tp), index) for index in range(2)]
    with torch.no_grad():
        for parameter in (p for block in stack for p in block.parameters()):
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    if sequence_parallel:
        x, grad = (t.chunk(2)[tp.rank] for t in (x, grad))
    plain, exact = gradients(stack, x, grad)
    out, found = gradients(stack, x, grad, recompute="selective")
    return [torch.equal(one, other) for one, other in zip([out, *found], [plain, *exact], strict=True)]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_bits_are_autograds_on_two_ranks(sequence_parallel: bool) -> None:
    for same in run_world(rank_main, 2, OPTIONS["everything"], sequence_parallel):
        assert len(same) > 20
        assert all(same)
