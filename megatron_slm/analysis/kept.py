"""Kept tokens of an excerpt: selection as in training, statistics by group, agreement between selections.

Shapes: W spans of s tokens; N valid tokens, in (span, position) order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_slm.analysis.excerpt import Bools, Excerpt
from megatron_slm.analysis.losses import Floats, ModelStatistics
from megatron_slm.analysis.token_types import TOKEN_TYPES, token_types
from megatron_slm.selection.scope import Scope
from megatron_slm.selection.scores import Score
from megatron_slm.selection.selector import Selector
from megatron_slm.types import MicroBatch, TokenStatistics

BANDS = ("rarest: 1 % of the text", "rare: the next 9 %", "common: the next 40 %", "most frequent: 50 % of the text")
_BAND_EDGES = (0.01, 0.10, 0.50)
LEVELS = 5
UNLABELED = "unlabeled"
"""Group of the tokens whose document labels no parts."""


@dataclass(frozen=True, kw_only=True)
class KeptTokens:
    """Tokens of an excerpt that one selection keeps, with their scores."""

    name: str
    score_Ws: Floats
    kept_Ws: Bools
    step: int | None = None
    """Training step of the selecting model; None if unknown."""

    def score_N(self, valid_Ws: Bools) -> Floats:
        """Return the scores of the valid tokens."""
        return self.score_Ws[valid_Ws]


def select(
    name: str,
    excerpt: Excerpt,
    model: ModelStatistics,
    reference: ModelStatistics | None,
    *,
    score: Score,
    keep_ratio: float,
    scope: Scope,
    spans_per_micro_batch: int,
    seed: int = 0,
) -> KeptTokens:
    """Select as in training: in each micro-batch of spans, the `ceil(keep_ratio * valid)` highest scores.

    Args:
        spans_per_micro_batch: number of spans ranked together; 0 ranks the whole excerpt as one micro-batch.
    """
    selector = Selector(scores=(score,), keep_ratio=keep_ratio, scope=scope, seed=seed)
    num_spans, length = excerpt.valid_Ws.shape
    batch_size = spans_per_micro_batch or num_spans
    score_Ws = np.zeros((num_spans, length), np.float32)
    kept_Ws = np.zeros((num_spans, length), np.bool_)
    for start in range(0, num_spans, batch_size):
        rows = slice(start, start + batch_size)
        tokens = torch.from_numpy(excerpt.tokens_Ws1[rows])
        valid_bs = torch.from_numpy(excerpt.valid_Ws[rows])
        batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], valid_bs, torch.arange(start, start + len(tokens)))
        ranking = selector.rank(_flat(model, rows), None if reference is None else _flat(reference, rows), batch)
        choice = selector.choose(ranking, length=length, step=0)
        score_Ws[rows] = choice.score_N.view(valid_bs.shape).numpy()
        kept_Ws[rows] = choice.kept_N.view(valid_bs.shape).numpy()
    return KeptTokens(name=name, score_Ws=score_Ws, kept_Ws=kept_Ws)


def _flat(statistics: ModelStatistics, rows: slice) -> TokenStatistics:
    entropy_Ws = statistics.entropy_Ws
    return TokenStatistics(
        torch.from_numpy(statistics.loss_Ws[rows]).flatten(),
        None if entropy_Ws is None else torch.from_numpy(entropy_Ws[rows]).flatten(),
    )


def agreement(first: KeptTokens, second: KeptTokens) -> float:
    """Return the share of the first selection's tokens that the second keeps; symmetric if both keep equally many."""
    return float((first.kept_Ws & second.kept_Ws).sum() / max(1, first.kept_Ws.sum()))


def levels(kept: KeptTokens, valid_Ws: Bools) -> npt.NDArray[np.int8]:
    """Return each token's fifth of the scores, int8 [W, s]; 0 is the highest."""
    score_N = kept.score_N(valid_Ws)
    rank_N = np.argsort(np.argsort(-score_N, kind="stable"), kind="stable")
    level_Ws = np.zeros(valid_Ws.shape, np.int8)
    level_Ws[valid_Ws] = rank_N * LEVELS // max(1, score_N.size)
    return level_Ws


@dataclass(frozen=True, kw_only=True)
class Group:
    """Statistics of the tokens of one group, losses and scores in nats."""

    grouping: str
    name: str
    tokens: int
    kept_share: float
    mean_loss: float
    mean_reference_loss: float | None
    mean_score: float


def groups(
    excerpt: Excerpt, kept: KeptTokens, model: ModelStatistics, reference: ModelStatistics | None
) -> list[Group]:
    """Compute kept share and means by token type, frequency, source, and labeled part of the document."""
    valid = excerpt.valid_Ws
    kept_N, score_N, loss_N = kept.kept_Ws[valid], kept.score_Ws[valid], model.loss_Ws[valid]
    reference_N = None if reference is None else reference.loss_Ws[valid]
    out = []
    for grouping, names, number_N in _groupings(excerpt):
        for number, name in enumerate(names):
            own = number_N == number
            if own.any():
                out.append(
                    Group(
                        grouping=grouping,
                        name=name,
                        tokens=int(own.sum()),
                        kept_share=float(kept_N[own].mean()),
                        mean_loss=float(loss_N[own].mean(dtype=np.float64)),
                        mean_reference_loss=None if reference_N is None else float(reference_N[own].mean(dtype=float)),
                        mean_score=float(score_N[own].mean(dtype=np.float64)),
                    )
                )
    return out


def _groupings(excerpt: Excerpt) -> Iterator[tuple[str, Sequence[str], npt.NDArray[np.int64]]]:
    """Yield every grouping that applies: its name, its groups' names, each token's group [N]."""
    valid = excerpt.valid_Ws
    label_N = excerpt.labels_Ws[valid]
    yield "token type", TOKEN_TYPES, token_types(excerpt.tokenizer, label_N).astype(np.int64)
    yield "frequency in this text", BANDS, frequency_bands(label_N)
    row_N = np.nonzero(valid)[0]
    sources = list(dict.fromkeys(span.source for span in excerpt.spans))
    if len(sources) > 1:
        number_W = np.array([sources.index(span.source) for span in excerpt.spans])
        yield "source", sources, number_W[row_N]
    if any(span.kinds for span in excerpt.spans):
        kinds: list[str] = []
        for span, count in zip(excerpt.spans, valid.sum(axis=1), strict=True):
            own = span.kinds[1:] or (None,) * int(count)
            kinds.extend(kind or UNLABELED for kind in own)
        names = list(dict.fromkeys(kinds))
        yield "part of the document", names, np.array([names.index(kind) for kind in kinds])


def frequency_bands(label_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the band of each token: ids sorted from rare to frequent, cut where they cover 1, 10, 50 % of the text."""
    ids, id_N, counts = np.unique(label_N, return_inverse=True, return_counts=True)
    order = np.argsort(counts, kind="stable")
    covered = np.cumsum(counts[order]) / max(1, label_N.size)
    band = np.empty(ids.size, np.int64)
    band[order] = np.searchsorted(np.array(_BAND_EDGES), covered, side="left")
    return band[id_N]
