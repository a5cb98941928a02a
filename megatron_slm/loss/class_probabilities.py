"""A few ids of each token's predicted distribution, for stores: the most probable ones, or a sample.

Both walk over the vocabulary once more, block by block. Offline work, so that simplicity goes before time.

Shapes: N rows (tokens), k ids of each, V vocabulary rows held here, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_slm.loss.blocks import BlockMemory, vocabulary_blocks
from megatron_slm.loss.row_statistics import RowStatistics
from megatron_slm.loss.vocab_parallel import VocabularyPart
from megatron_slm.parallel.collectives import all_gather_dim0
from megatron_slm.types import SparseDistribution

LEAST_REST = 2.0**-24
"""Least probability of all other ids together, which is 1 less a sum of fp32 numbers."""


@torch.no_grad()
def most_probable(
    hidden_Nd: Tensor, weight_Vd: Tensor, rows: RowStatistics, part: VocabularyPart, *, count: int, limit: int
) -> SparseDistribution:
    """Return each token's most probable ids, the first one most. Collective over the vocabulary's parts.

    Args:
        rows: statistics over the whole vocabulary.
        count: number of ids.
        limit: ids from there on are never among them: rows of the weight that no token has.
    """
    value_Nk = hidden_Nd.new_full((len(hidden_Nd), count), -torch.inf, dtype=rows.max_N.dtype)
    id_Nk = torch.zeros_like(value_Nk, dtype=torch.int64)
    for start, logits_NB in _blocks(hidden_Nd, weight_Vd, part, limit):
        column_B = torch.arange(start, start + logits_NB.shape[1], device=logits_NB.device)
        value_Nk, id_Nk = _largest(
            torch.cat([value_Nk, logits_NB], dim=1),
            torch.cat([id_Nk, column_B.expand(len(logits_NB), -1)], dim=1),
            count,
        )
    if part.tp.size > 1:
        parts = [all_gather_dim0(x[None], part.tp).transpose(0, 1).flatten(1) for x in (value_Nk, id_Nk)]
        value_Nk, id_Nk = _largest(parts[0], parts[1], count)
    log_probability_Nk = value_Nk - rows.max_N[:, None] - rows.sum_N.log()[:, None]
    rest_N = (1 - log_probability_Nk.double().exp().sum(1)).clamp(min=LEAST_REST)
    return SparseDistribution(id_Nk, log_probability_Nk, rest_N.log().to(log_probability_Nk.dtype))


def _largest(value_NM: Tensor, id_NM: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of each row's values, in order, and their ids."""
    top = value_NM.topk(count, dim=1)
    return top.values, id_NM.gather(1, top.indices)


@torch.no_grad()
def sampled(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    rows: RowStatistics,
    part: VocabularyPart,
    uniform_N: Tensor,
    *,
    count: int,
    limit: int,
) -> Tensor:
    """Draw `count` ids of each token's distribution, ascending, int64 [N, count]. Collective over the parts.

    Systematic: draw j is the id at `(j + u) / count` of the cumulative distribution, so that an id's expected number
    of draws is `count` times its probability, and the actual number at most 1 away.

    Args:
        rows: statistics over the whole vocabulary.
        uniform_N: one number in [0, 1) a token, the same on all ranks.
        limit: ids from there on are never drawn: rows of the weight that no token has.
    """

    def probabilities() -> Iterator[tuple[int, Tensor]]:
        for start, logits_NB in _blocks(hidden_Nd, weight_Vd, part, limit):
            yield start, logits_NB.sub_(rows.max_N[:, None]).exp_().double()

    mass_N = torch.zeros_like(rows.sum_N, dtype=torch.float64)
    for _, p_NB in probabilities():
        mass_N += p_NB.sum(1)
    masses_PN = all_gather_dim0(mass_N[None], part.tp) if part.tp.size > 1 else mass_N[None]
    ends_PN = masses_PN.cumsum(0)
    before_N = ends_PN[part.tp.rank] - mass_N
    step_k = torch.arange(count, dtype=torch.float64, device=mass_N.device)
    point_Nk = (step_k + uniform_N.double()[:, None]) / count * ends_PN[-1][:, None]
    id_Nk = torch.full_like(point_Nk, -1, dtype=torch.int64)
    for start, p_NB in probabilities():
        end_NB = p_NB.cumsum(1) + before_N[:, None]
        column_Nk = torch.searchsorted(end_NB, point_Nk, right=True)
        here_Nk = (point_Nk >= before_N[:, None]) & (column_Nk < p_NB.shape[1])
        id_Nk = torch.where(here_Nk & (id_Nk < 0), start + column_Nk, id_Nk)
        before_N = end_NB[:, -1]
    if part.tp.size > 1:
        id_Nk = all_gather_dim0(id_Nk[None], part.tp).amax(0)
    # points that rounding left between two parts, or behind the last one, are the next id's or the last one's
    id_Nk = torch.where(id_Nk < 0, limit - 1, id_Nk).flip(1).cummin(1).values.flip(1)
    return id_Nk


def _blocks(hidden_Nd: Tensor, weight_Vd: Tensor, part: VocabularyPart, limit: int) -> Iterator[tuple[int, Tensor]]:
    """Compute the logits of one block after the other: (id of the first column, logits [N, B]), ids below `limit`."""
    held = weight_Vd[: max(0, limit - part.start)]
    memory = BlockMemory(len(hidden_Nd), held.shape[0], hidden_Nd, softcap=part.softcap)
    for block in vocabulary_blocks(held):
        yield part.start + block.start, memory.logits(hidden_Nd, block)
