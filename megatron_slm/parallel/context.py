"""The cut of every sequence over the context-parallel ranks, and the way back.

A sequence of s positions is cut into 2 x size equal stretches. Rank r holds stretch r, and stretch r counted from the
end: causal attention has as much work on every rank. Queries stay; keys and values are gathered, so that attention is
exact with any mask, and their gradients are summed on the way back (reduce-scatter).

Shapes: s positions of a sequence, l = s / size of them held here, b samples, N = b * s, M = b * l.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.parallel.collectives import all_gather_dim0
from megatron_slm.parallel.groups import ContextParallel, DataParallel
from megatron_slm.parallel.pieces import pieces_of
from megatron_slm.types import DenseDistribution, MicroBatch, TokenStatistics


def stretches(length: int, ranks: ContextParallel) -> tuple[range, ...]:
    """Return the runs of a sequence's positions that are held here, rising: one where sequences are whole."""
    if ranks.size == 1:
        return (range(length),)
    width = length // (2 * ranks.size)
    return tuple(range(n * width, (n + 1) * width) for n in (ranks.rank, 2 * ranks.size - 1 - ranks.rank))


def positions(length: int, ranks: ContextParallel, device: torch.device | None = None) -> Tensor:
    """Return the positions of a sequence that are held here, rising, int64 [l]."""
    return torch.cat([torch.arange(run.start, run.stop, device=device) for run in stretches(length, ranks)])


def held_rows(num_samples: int, length: int, ranks: ContextParallel, device: torch.device | None = None) -> Tensor:
    """Return the rows of a whole micro-batch, in (sample, position) order, that are held here, int64 [M]."""
    starts_b = torch.arange(num_samples, device=device) * length
    return (starts_b[:, None] + positions(length, ranks, device)).flatten()


def in_sequence_order(parts: Tensor, dim: int, ranks: ContextParallel, out: Tensor | None = None) -> Tensor:
    """Put the ranks' positions together, [size, ...] to [...] with l positions along `dim` becoming s.

    Args:
        dim: of the positions in one rank's part.
        out: filled with the result.
    """
    if ranks.size == 1 and out is None:
        return parts.squeeze(0)
    halves = parts.unflatten(dim + 1, (2, -1)).movedim(dim + 1, 0)
    return torch.cat([*halves[0].unbind(), *reversed(halves[1].unbind())], dim, out=out)


def by_rank(whole: Tensor, dim: int, ranks: ContextParallel) -> Tensor:
    """Cut positions into the ranks' parts, [...] to [size, ...]: the way back from `in_sequence_order`.

    Args:
        dim: of the positions.
    """
    if ranks.size == 1:
        return whole.unsqueeze(0)
    firsts, seconds = whole.unflatten(dim, (2 * ranks.size, -1)).movedim(dim, 0).chunk(2)
    return torch.stack([firsts, seconds.flip(0)], dim + 1).flatten(dim + 1, dim + 2)


def cut_batch(batch: MicroBatch, ranks: ContextParallel) -> MicroBatch:
    """Cut a micro-batch to the positions held here; documents keep their whole lengths."""
    if ranks.size == 1:
        return batch
    num_samples, length = batch.tokens_bs.shape
    position_s = positions(length, ranks, batch.tokens_bs.device)

    def cut(x_bs: Tensor) -> Tensor:
        return x_bs[:, position_s].contiguous()

    documents = batch.documents
    if documents is not None:
        position_bs = None if documents.position_bs is None else cut(documents.position_bs)
        pieces = None
        if documents.lengths is not None:
            pieces = pieces_of(documents.lengths, stretches(length, ranks), num_samples, length)
        documents = documents._replace(position_bs=position_bs, pieces=pieces)
    return batch._replace(
        tokens_bs=cut(batch.tokens_bs),
        labels_bs=cut(batch.labels_bs),
        valid_bs=cut(batch.valid_bs),
        documents=documents,
        columns=None if batch.columns is None else {name: cut(x) for name, x in batch.columns.items()},
        position_s=position_s,
    )


def cut_statistics(statistics: TokenStatistics, batch: MicroBatch, ranks: ContextParallel) -> TokenStatistics:
    """Cut the stored statistics of a whole micro-batch to the rows held here."""
    if ranks.size == 1:
        return statistics
    num_samples, length = batch.tokens_bs.shape
    row_M = held_rows(num_samples, length, ranks)
    distribution = statistics.distribution
    assert not isinstance(distribution, DenseDistribution), "stores hold a few ids of each distribution"
    if distribution is not None:
        distribution = distribution._replace(**_rows(distribution._asdict(), row_M))
    statistics = statistics._replace(distribution=None)
    return statistics._replace(**_rows(statistics._asdict(), row_M), distribution=distribution)


def _rows(columns: dict[str, Tensor | None], row_M: Tensor) -> dict[str, Tensor]:
    return {name: x[row_M] for name, x in columns.items() if x is not None}


def gather_samples(x_blk: Tensor, ranks: ContextParallel, device: torch.device) -> Tensor:
    """Put a value of the positions held on each rank together, [b, l, ...] to [b, s, ...], of any dtype, on the CPU."""
    if ranks.size == 1:
        return x_blk
    bytes_blk = x_blk.contiguous().unsqueeze(-1).view(torch.uint8).to(device)  # not every dtype can be sent
    parts = all_gather_dim0(bytes_blk[None], ranks)
    return in_sequence_order(parts, 1, ranks).contiguous().cpu().view(x_blk.dtype).squeeze(-1)


def whole_rows(
    parts: Tensor, num_samples: int, context: ContextParallel, ranks: DataParallel | ContextParallel
) -> Tensor:
    """Put the columns of the ranks' tables together, [ranks, R, M] to [R, rows of all], in (sample, position) order.

    Args:
        ranks: the context-parallel ranks, or those of several micro-batches.
    """
    num_batches = ranks.size // context.size
    by_batch = parts.unflatten(0, (num_batches, context.size)).unflatten(-1, (num_samples, -1)).transpose(0, 1)
    return in_sequence_order(by_batch, 3, context).transpose(0, 1).flatten(1)
