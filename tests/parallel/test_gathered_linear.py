"""The linear layer that gathers twice, against autograd's product of a sequence that was gathered once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_slm.parallel.collectives import gather_sequence
from megatron_slm.parallel.gathered_linear import gathered_linear
from megatron_slm.parallel.groups import create_tensor_parallel_group, init_distributed
from megatron_slm.parallel.topology import Topology
from tests.support.saved import saved_bytes
from tests.support.world import run_world

LENGTH, SAMPLES, WIDTH, OUT = 6, 3, 16, 10


def rank_main() -> list[tuple[str, bool, int, int]]:
    init_distributed()
    tp = create_tensor_parallel_group(Topology(tensor=2), sequence_parallel=True)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for bias in (False, True):
            torch.manual_seed(1)
            whole = torch.randn(2 * LENGTH, SAMPLES, WIDTH, dtype=dtype)
            weight = torch.randn(OUT, WIDTH, dtype=dtype).requires_grad_()
            bias_o = torch.randn(OUT, dtype=dtype).requires_grad_() if bias else None
            grad = torch.randn(2 * LENGTH, SAMPLES, OUT, dtype=dtype)
            outcomes = []
            for layer in (gathered_linear, lambda x, w, b, tp: F.linear(gather_sequence(x, tp), w, b)):
                x = whole.chunk(2)[tp.rank].clone().requires_grad_()
                out = layer(x, weight, bias_o, tp)
                leaves = [x, weight, *([bias_o] if bias_o is not None else [])]
                outcomes.append([out, *torch.autograd.grad(out, leaves, grad)])
            same = all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
            x = whole.chunk(2)[tp.rank].clone().requires_grad_()
            saved = saved_bytes(lambda x=x, w=weight, b=bias_o: gathered_linear(x, w, b, tp), besides=[weight])
            found.append((f"{dtype}, bias {bias}", same, saved, x.untyped_storage().nbytes()))
    dist.barrier()
    return found


def test_the_bits_are_autograds_and_the_part_alone_is_kept() -> None:
    for found in run_world(rank_main, 2):
        assert len(found) == 4
        for name, same, saved, part in found:
            assert same, name
            assert saved == part, name


@pytest.mark.parametrize("bias", [False, True])
def test_nothing_is_kept_where_nothing_is_differentiated(bias: bool) -> None:
    (found,) = run_world(no_gradient, 1, bias)
    assert found == (0, True)


def no_gradient(bias: bool) -> tuple[int, bool]:
    from tests.support.saved import alone_of

    tp = alone_of(4, sequence_parallel=True)
    weight, bias_o = torch.ones(OUT, WIDTH), torch.ones(OUT) if bias else None
    saved = saved_bytes(lambda: gathered_linear(torch.ones(2, 1, WIDTH), weight, bias_o, tp))
    return saved, not gathered_linear(torch.ones(2, 1, WIDTH), weight, bias_o, tp).requires_grad
