"""Attention where only some runs of a sequence's positions ask, and all positions before them answer.

Shapes: s positions of a sample, l of them with queries here, b samples, h query heads, g key/value groups, k width of a
head; M = b * l queries, N = b * s keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_slm.types import Documents, Pieces


class Attend(Protocol):
    """Attention from the last positions of some keys to themselves and those before (`sdpa.attend`)."""

    def __call__(self, q_sbhk: Tensor, k_sbgk: Tensor, v_sbgk: Tensor, window: int | None, /) -> Tensor:
        """Attend, [s, b, h, k]."""
        ...


AttendInPieces = Callable[[Tensor, Tensor, Tensor, int | None, Pieces], Tensor]
"""Attention within pieces of documents, [M, h, k] (`sdpa.attend_in_pieces`)."""


def attend_from(
    runs: Sequence[range],
    attend: Attend,
    attend_in_pieces: AttendInPieces,
    q_lbhk: Tensor,
    k_sbgk: Tensor,
    v_sbgk: Tensor,
    window: int | None,
    documents: Documents | None,
) -> Tensor:
    """Attend from the positions of some runs to themselves and the positions before, [l, b, h, k].

    Args:
        runs: positions of the queries, rising.
        window: number of positions to attend to, including the current one; None for all.
        documents: with `pieces`, where attention keeps documents apart; None for whole samples.
    """
    if documents is not None and documents.pieces is not None:
        length, num_samples = q_lbhk.shape[:2]
        q_Mhk, k_Ngk, v_Ngk = (x.transpose(0, 1).flatten(0, 1) for x in (q_lbhk, k_sbgk, v_sbgk))
        out_Mhk = attend_in_pieces(q_Mhk, k_Ngk, v_Ngk, window, documents.pieces)
        return out_Mhk.unflatten(0, (num_samples, length)).transpose(0, 1)
    found = []
    for run, q_rbhk in zip(runs, q_lbhk.split([len(run) for run in runs]), strict=True):
        keys = slice(first_seen(run.start, window), run.stop)
        found.append(attend(q_rbhk, k_sbgk[keys], v_sbgk[keys], window))
    return torch.cat(found)


def first_seen(position: int, window: int | None) -> int:
    """Return the first position that a position attends to."""
    return 0 if window is None else max(0, position - window + 1)


def attend_piece_by_piece(
    attend: Attend, q_Mhk: Tensor, k_Ngk: Tensor, v_Ngk: Tensor, window: int | None, pieces: Pieces
) -> Tensor:
    """Attend within each piece of a document separately, [M, h, k]."""
    found = []
    for q_qhk, (first, count) in zip(q_Mhk.split(pieces.queries), pieces.keys, strict=True):
        stop = first + count
        first = max(first, first_seen(stop - len(q_qhk), window))
        q, k, v = (x[:, None] for x in (q_qhk, k_Ngk[first:stop], v_Ngk[first:stop]))
        found.append(attend(q, k, v, window))
    return torch.cat(found).squeeze(1)
