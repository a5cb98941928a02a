"""Which tokens of a sample a selection keeps, what they are, and how far two selections agree.

Shapes: W windows of s tokens; N valid tokens, in (window, position) order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_slm.analysis.losses import Floats, Statistics
from megatron_slm.analysis.sample import Bools, Sample, TokenTypes
from megatron_slm.selection.scope import Scope
from megatron_slm.selection.scores import Score
from megatron_slm.selection.selector import Selector
from megatron_slm.types import MicroBatch, TokenStatistics

BANDS = ("rare: the last 1 % of the text", "9 % before it", "40 % before it", "frequent: half of the text")
_BAND_EDGES = (0.01, 0.10, 0.50)
LEVELS = 5


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One selection on a sample."""

    name: str
    score_Ws: Floats
    kept_Ws: Bools
    step: int | None = None
    """The step of the model that selects; None where its folder does not say."""

    def score_N(self, valid_Ws: Bools) -> Floats:
        """The scores of valid tokens."""
        return self.score_Ws[valid_Ws]


def select(
    name: str,
    sample: Sample,
    model: Statistics,
    reference: Statistics | None,
    *,
    score: Score,
    keep_ratio: float,
    scope: Scope,
    windows_together: int,
    seed: int = 0,
) -> Kept:
    """Select as training does: micro-batches of windows, each with the `ceil(keep_ratio * valid)` highest scores.

    Args:
        windows_together: windows of a micro-batch; 0: all of the sample are one.
    """
    selector = Selector(scores=(score,), keep_ratio=keep_ratio, scope=scope, seed=seed)
    num_windows, length = sample.valid_Ws.shape
    together = windows_together or num_windows
    score_Ws = np.zeros((num_windows, length), np.float32)
    kept_Ws = np.zeros((num_windows, length), np.bool_)
    for start in range(0, num_windows, together):
        part = slice(start, start + together)
        tokens = torch.from_numpy(sample.tokens_Ws1[part])
        valid_bs = torch.from_numpy(sample.valid_Ws[part])
        batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], valid_bs, torch.arange(start, start + len(tokens)))
        ranking = selector.rank(_flat(model, part), None if reference is None else _flat(reference, part), batch)
        choice = selector.choose(ranking, length=length, step=0)
        score_Ws[part] = choice.score_N.view(valid_bs.shape).numpy()
        kept_Ws[part] = choice.kept_N.view(valid_bs.shape).numpy()
    return Kept(name=name, score_Ws=score_Ws, kept_Ws=kept_Ws)


def _flat(statistics: Statistics, part: slice) -> TokenStatistics:
    entropy_Ws = statistics.entropy_Ws
    return TokenStatistics(
        torch.from_numpy(statistics.loss_Ws[part]).flatten(),
        None if entropy_Ws is None else torch.from_numpy(entropy_Ws[part]).flatten(),
    )


def agreement(first: Kept, second: Kept) -> float:
    """The share of the first's kept tokens that the second keeps too; of equally many, it is symmetric."""
    return float((first.kept_Ws & second.kept_Ws).sum() / max(1, first.kept_Ws.sum()))


def levels(kept: Kept, valid_Ws: Bools) -> npt.NDArray[np.int8]:
    """The fifth of all scores that each token is in, int8 [W, s]: 0 is the highest."""
    score_N = kept.score_N(valid_Ws)
    order = np.argsort(np.argsort(-score_N, kind="stable"), kind="stable")
    level_Ws = np.zeros(valid_Ws.shape, np.int8)
    level_Ws[valid_Ws] = order * LEVELS // max(1, score_N.size)
    return level_Ws


@dataclass(frozen=True, kw_only=True)
class Group:
    """The tokens of one kind."""

    grouping: str
    name: str
    tokens: int
    kept_share: float
    mean_loss: float
    mean_reference_loss: float | None
    mean_score: float


def groups(sample: Sample, kept: Kept, model: Statistics, reference: Statistics | None) -> list[Group]:
    """Kept share and mean losses by token type, frequency, source, and what the documents say tokens are part of."""
    valid = sample.valid_Ws
    kept_N, score_N, loss_N = kept.kept_Ws[valid], kept.score_Ws[valid], model.loss_Ws[valid]
    reference_N = None if reference is None else reference.loss_Ws[valid]
    out = []
    for grouping, names, number_N in _groupings(sample):
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


def _groupings(sample: Sample) -> list[tuple[str, Sequence[str], npt.NDArray[np.int64]]]:
    valid = sample.valid_Ws
    label_N = sample.labels_Ws[valid]
    types = TokenTypes()
    out: list[tuple[str, Sequence[str], npt.NDArray[np.int64]]] = [
        ("token type", types.names, types.of(sample.tokenizer, label_N).astype(np.int64)),
        ("frequency in this text", BANDS, frequency_bands(label_N)),
    ]
    window_N = np.nonzero(valid)[0]
    sources = list(dict.fromkeys(window.source for window in sample.windows))
    if len(sources) > 1:
        number_W = np.array([sources.index(window.source) for window in sample.windows])
        out.append(("source", sources, number_W[window_N]))
    if any(window.kinds for window in sample.windows):
        kinds = [kind or "not said" for window, count in zip(sample.windows, valid.sum(axis=1), strict=True)
                 for kind in (window.kinds[1:] or (None,) * int(count))]  # fmt: skip
        names = list(dict.fromkeys(kinds))
        out.append(("part of the document", names, np.array([names.index(kind) for kind in kinds])))
    return out


def frequency_bands(label_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The band of each token: ids sorted from rare to frequent, and cut where they cover 1, 10 and 50 % of the text."""
    ids, place_N, counts = np.unique(label_N, return_inverse=True, return_counts=True)
    order = np.argsort(counts, kind="stable")
    covered = np.cumsum(counts[order]) / max(1, label_N.size)
    band = np.empty(ids.size, np.int64)
    band[order] = np.searchsorted(np.array(_BAND_EDGES), covered, side="left")
    return band[place_N]
