"""The loss over a cut vocabulary: bit-equal losses and kept sets on all ranks, gradients those of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_slm.loss import LossHead, selective_cross_entropy, variants
from megatron_slm.loss.objective import Objective, OutputWeight, StepSettings
from megatron_slm.loss.sums import SumLayout
from megatron_slm.loss.vocab_parallel import VocabularyPart, loss_rows
from megatron_slm.parallel.groups import TensorParallel, create_tensor_parallel_group, init_distributed
from megatron_slm.parallel.topology import Topology
from megatron_slm.selection import scope
from megatron_slm.selection.scores import SCORES
from megatron_slm.selection.select import top_share
from megatron_slm.selection.selector import Selector
from megatron_slm.types import MicroBatch, Selection, TokenStatistics
from tests.loss.heads import Problem
from tests.support.world import run_world

VOCAB, PADDED, LENGTH, BATCH, WIDTH = 21, 24, 8, 2, 6


def outcome(tp: TensorParallel, *, ties: bool) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    x_sbd = torch.randn(LENGTH, BATCH, WIDTH, generator=g)
    if ties:  # every position alike: which ones are kept is the tie rule's decision alone
        x_sbd = x_sbd[:1, :1].expand(LENGTH, BATCH, WIDTH).clone()
    weight = torch.randn(VOCAB, WIDTH, generator=g)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=g)
    labels = torch.full_like(tokens, 4) if ties else torch.randint(VOCAB, (BATCH, LENGTH), generator=g)
    reference = torch.zeros(BATCH * LENGTH) if ties else torch.rand(BATCH * LENGTH, generator=g) * 4
    valid = torch.ones_like(labels, dtype=torch.bool)
    valid[0, 2] = False
    rows = PADDED // tp.size
    start = tp.rank * rows
    shard = weight[start : min(start + rows, VOCAB)].clone().requires_grad_()
    if tp.sequence_parallel:
        x_sbd = x_sbd.chunk(tp.size)[tp.rank].clone()
    x_sbd.requires_grad_()
    kept: list[list[int]] = []
    losses: list[torch.Tensor] = []

    def observe(batch: MicroBatch, token_loss: torch.Tensor, _: Any, kept_K: torch.Tensor) -> None:
        kept.append(kept_K.tolist())
        losses.append(token_loss)

    objective = Objective(selector=Selector(scores=(SCORES["excess"],), keep_ratio=0.6), tp=tp, observer=observe)
    loss, sums = objective.loss(
        x_sbd,
        OutputWeight(shard, start, rows),
        MicroBatch(tokens, labels, valid, torch.arange(BATCH)),
        TokenStatistics(reference),
        StepSettings(step=0),
    )
    loss.backward()
    hidden_grad = x_sbd.grad
    if tp.sequence_parallel:
        parts = [torch.empty_like(hidden_grad) for _ in range(tp.size)]
        dist.all_gather(parts, hidden_grad, group=tp.group)
        hidden_grad = torch.cat(parts)
    return {"loss": loss.detach(), "sums": SumLayout().unpack(sums), "kept": kept[0], "losses": losses[0], "hidden": hidden_grad,
            "weight": shard.grad}  # fmt: skip


def rank_main(size: int, sequence_parallel: bool, ties: bool) -> dict[str, Any]:
    init_distributed()
    return outcome(create_tensor_parallel_group(Topology(tensor=size), sequence_parallel=sequence_parallel), ties=ties)


@pytest.mark.parametrize("ties", [False, True], ids=["scores", "ties"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
@pytest.mark.parametrize("size", [2, 4])
def test_cut_vocabulary(size: int, sequence_parallel: bool, ties: bool) -> None:
    single = outcome(TensorParallel(), ties=ties)
    ranks = run_world(rank_main, size, size, sequence_parallel, ties)
    for rank in ranks:
        assert rank["kept"] == single["kept"]
        assert torch.equal(rank["losses"], ranks[0]["losses"]), "losses differ in their bits between ranks"
        assert torch.allclose(rank["losses"], single["losses"], atol=1e-6)
        assert torch.allclose(rank["hidden"], single["hidden"], atol=1e-6)
        assert rank["sums"].kept_tokens == single["sums"].kept_tokens == 9
    assert torch.allclose(torch.cat([rank["weight"] for rank in ranks]), single["weight"], atol=1e-6)


def cut_head_main(size: int, variant: Any, vocab: int) -> dict[str, Any]:
    """Any variant over a cut vocabulary, in chunks of a few rows, with entropies, labels on every rank."""
    variants.CHUNK_ROWS = 5
    init_distributed()
    tp = create_tensor_parallel_group(Topology(tensor=size), sequence_parallel=False) if size > 1 else TensorParallel()
    p = Problem.random(40, vocab, dtype=torch.float64)
    rows = -(-vocab // size)  # the last rank holds fewer, and with 9 tokens on 4 ranks none at all
    start = min(tp.rank * rows, vocab)
    weight_Vd = p.weight_Vd[start : start + rows].detach().clone().requires_grad_()

    def select(tokens: TokenStatistics) -> Selection:
        return Selection(top_share(tokens.loss_N - p.reference_N, p.valid_N, 0.6))

    result = selective_cross_entropy(
        p.hidden_Nd,
        weight_Vd,
        p.label_N,
        p.valid_N,
        select=select,
        predict=lambda chunk, tokens: tokens.loss_N - p.reference_N[chunk] > 1.4,
        keep_ratio=0.6,
        part=VocabularyPart(tp=tp, start=start, rows=rows),
        with_entropy=True,
        with_top_entropy=True,
        head=LossHead(variant=variant, stash_bytes=32 * max(1, len(weight_Vd)) * 8),
    )
    result.loss_sum.backward()
    return {
        "kept": result.selection.kept_K,
        "losses": result.statistics.loss_N,
        "entropies": result.statistics.entropy_N,
        "top entropies": result.statistics.top_entropy_N,
        "hidden": p.hidden_Nd.grad,
        "weight": weight_Vd.grad,
    }


@pytest.mark.parametrize(("size", "vocab"), [(2, 4999), (4, 4999), (4, 9)])
@pytest.mark.parametrize("variant", ["recompute", "stash", "predictive"])
def test_every_variant_over_a_cut_vocabulary(size: int, vocab: int, variant: str) -> None:
    (single,) = run_world(cut_head_main, 1, 1, variant, vocab)
    ranks = run_world(cut_head_main, size, size, variant, vocab)
    for rank in ranks:
        assert torch.equal(rank["kept"], single["kept"])
        for name in ("losses", "entropies", "top entropies", "hidden"):
            assert torch.equal(rank[name], ranks[0][name]), f"{name} differ in their bits between ranks"
            assert torch.allclose(rank[name], single[name], rtol=0, atol=1e-10)
    assert torch.allclose(torch.cat([rank["weight"] for rank in ranks]), single["weight"], rtol=0, atol=1e-10)


def tied_to_rank_main(size: int) -> list[int]:
    """The tie rule planted wrong: one rank prefers the higher position."""
    real = scope.top_mask

    def by_rank(score_N: torch.Tensor, valid_N: torch.Tensor, keep_ratio: float, _: None) -> torch.Tensor:
        if dist.get_rank() == 0:
            return real(score_N, valid_N, keep_ratio)
        return real(score_N.flip(0), valid_N.flip(0), keep_ratio).flip(0)

    scope.top_mask = by_rank
    return rank_main(size, False, True)["kept"]


def test_a_tie_broken_by_rank_is_seen() -> None:
    """What `test_cut_vocabulary` compares would differ."""
    first, second = run_world(tied_to_rank_main, 2, 2)
    assert first != second
    assert first == outcome(TensorParallel(), ties=True)["kept"]


def test_rows_are_in_sequence_then_position_order() -> None:
    x_sbd = torch.arange(3 * 2).view(3, 2, 1)
    assert loss_rows(x_sbd, TensorParallel()).flatten().tolist() == [0, 2, 4, 1, 3, 5]
