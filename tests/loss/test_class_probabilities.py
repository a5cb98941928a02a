"""A few ids of each distribution against the whole table: the most probable ones, and samples without a bias."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.loss.class_probabilities import most_probable, sampled
from megatron_slm.loss.selective_ce import WHOLE_VOCABULARY, row_statistics
from megatron_slm.loss.vocab_parallel import VocabularyPart
from megatron_slm.parallel.groups import TensorParallel, create_tensor_parallel_group, init_distributed
from megatron_slm.parallel.topology import Topology
from megatron_slm.reference.manifest import StoredDistribution
from megatron_slm.reference.probabilities import Probabilities
from megatron_slm.types import SparseDistribution
from tests.loss.heads import Problem
from tests.support.world import run_world

LIMIT = 4900
"""Fewer than the rows of the weight."""


def found(p: Problem, part: VocabularyPart, uniform_N: Tensor) -> tuple[SparseDistribution, Tensor]:
    hidden, weight = p.hidden_Nd.detach(), p.weight_Vd.detach()
    if part.rows is not None:
        weight = weight[part.start : part.start + part.rows]
    rows = row_statistics(hidden, weight, p.label_N, part=part)
    top = most_probable(hidden, weight, rows, part, count=20, limit=LIMIT)
    return top, sampled(hidden, weight, rows, part, uniform_N, count=50, limit=LIMIT)


def log_table(p: Problem) -> Tensor:
    return torch.log_softmax(p.hidden_Nd.detach() @ p.weight_Vd.detach().t(), -1)


def test_the_most_probable_ids_and_the_rest() -> None:
    p = Problem.random(40, 4999)
    top, _ = found(p, WHOLE_VOCABULARY, torch.rand(40))
    expected = log_table(p)[:, :LIMIT].topk(20)
    assert torch.equal(top.id_Nk, expected.indices)
    assert torch.allclose(top.log_probability_Nk, expected.values, rtol=0, atol=1e-12)
    assert top.log_rest_N is not None
    assert torch.allclose(top.log_rest_N, (1 - expected.values.exp().sum(1)).log(), rtol=0, atol=1e-12)


def test_samples_have_the_distributions_mean() -> None:
    """Over a grid of uniform numbers the mean is the distribution; each sample is at most one draw away from it."""
    p, grid = Problem.random(6, 4999), 400
    table = log_table(p)[:, :LIMIT].exp()
    table /= table.sum(1, keepdim=True)
    mean = torch.zeros_like(table)
    for number in range(grid):
        _, id_Nk = found(p, WHOLE_VOCABULARY, torch.full((6,), (number + 0.5) / grid, dtype=torch.float64))
        assert torch.equal(id_Nk, id_Nk.sort(1).values)
        counts = torch.zeros_like(table).scatter_add_(1, id_Nk, torch.ones_like(id_Nk, dtype=table.dtype))
        assert (counts - 50 * table).abs().max() < 1 + 1e-9
        mean += counts / 50 / grid
    assert (mean - table).abs().max() < 1 / 50 / grid + 1e-9


def test_a_stored_sample_has_distinct_ids_and_their_shares() -> None:
    id_bsk = torch.tensor([[[3, 3, 3, 9], [0, 1, 2, 2]]]).to(torch.uint32)
    found = Probabilities(id_bsk).distribution(torch.tensor([[1.5, 2.5]]))
    assert found.id_Nk.tolist() == [[3, 9, 0, 0], [0, 1, 2, 0]]
    assert found.log_probability_Nk.exp().tolist() == [[0.75, 0.25, 0.0, 0.0], [0.25, 0.25, 0.5, 0.0]]
    assert found.entropy_N is not None
    assert found.entropy_N.tolist() == [1.5, 2.5]


def test_bf16_probabilities_sum_to_one() -> None:
    p = Problem.random(40, 4999, dtype=torch.float32)
    top, _ = found(p, WHOLE_VOCABULARY, torch.rand(40))
    stored = StoredDistribution(kind="top", count=20, dtype="bfloat16", vocabulary_size=4999)
    kept = Probabilities.of(top, stored, torch.Size([4, 10]))
    assert [x.dtype for x in kept] == [torch.uint32, torch.bfloat16, torch.bfloat16]  # type: ignore[union-attr]
    read = kept.distribution(None)
    assert read.log_rest_N is not None
    total = read.log_probability_Nk.exp().sum(1) + read.log_rest_N.exp()
    assert (total - 1).abs().max() < 1e-6
    assert (read.log_probability_Nk - top.log_probability_Nk).abs().max() < 0.1
    assert torch.equal(read.id_Nk, top.id_Nk)
    assert stored.bytes_per_token == 20 * 6 + 2


def cut_main(size: int) -> tuple[list[Tensor], Tensor]:
    init_distributed()
    tp = create_tensor_parallel_group(Topology(tensor=size), sequence_parallel=False) if size > 1 else TensorParallel()
    rows = -(-4999 // size)
    part = VocabularyPart(tp=tp, start=tp.rank * rows, rows=rows)
    top, id_Nk = found(Problem.random(40, 4999), part, torch.rand(40, generator=torch.Generator().manual_seed(3)))
    return [top.id_Nk, top.log_probability_Nk, top.log_rest_N], id_Nk  # type: ignore[list-item]


def test_a_cut_vocabulary_has_the_same_ids() -> None:
    (single,) = run_world(cut_main, 1, 1)
    for size in (2, 4):
        for top, id_Nk in run_world(cut_main, size, size):
            assert torch.equal(top[0], single[0][0])
            assert torch.equal(id_Nk, single[1])
            assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(top[1:], single[0][1:], strict=True))
