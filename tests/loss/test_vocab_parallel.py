"""The loss over a cut vocabulary: bit-equal losses and kept sets on all ranks, gradients those of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_slm.loss.objective import Objective, OutputWeight, StepSettings
from megatron_slm.loss.vocab_parallel import loss_rows
from megatron_slm.parallel.groups import TensorParallel, init_distributed, tensor_parallel_group
from megatron_slm.parallel.topology import Topology
from megatron_slm.selection.scores import SCORES
from megatron_slm.selection.selector import Selector
from megatron_slm.types import MicroBatch, TokenStatistics
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
        OutputWeight(shard, start),
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
    return {"loss": loss.detach(), "sums": sums, "kept": kept[0], "losses": losses[0], "hidden": hidden_grad,
            "weight": shard.grad}  # fmt: skip


def rank_main(size: int, sequence_parallel: bool, ties: bool) -> dict[str, Any]:
    init_distributed()
    return outcome(tensor_parallel_group(Topology(tensor=size), sequence_parallel=sequence_parallel), ties=ties)


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


def test_rows_are_in_sequence_then_position_order() -> None:
    x_sbd = torch.arange(3 * 2).view(3, 2, 1)
    assert loss_rows(x_sbd, TensorParallel()).flatten().tolist() == [0, 2, 4, 1, 3, 5]
