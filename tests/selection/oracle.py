"""Selection the slow way: lists, loops and sorts."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch

from megatron_slm.types import MicroBatch, TokenStatistics


def sets_of(num_tokens: int, length: int, scope: str) -> list[list[int]]:
    """The positions that are ranked together."""
    if scope == "sequence":
        return [list(range(first, first + length)) for first in range(0, num_tokens, length)]
    return [list(range(num_tokens))]


def top(score: list[float], competing: list[int], always: set[int], ratio: float) -> set[int]:
    """`ceil(ratio * competing)` highest; the lower position first among equals; `always` before all others."""
    ranked = sorted(competing, key=lambda i: (i not in always, -(score[i] + 0.0), i))
    share = max(min(len(ranked), 1), math.ceil(round(ratio * len(ranked), 9)))
    return set(ranked[: max(share, sum(i in always for i in competing))])


def standardize(score: list[float], competing: list[int]) -> dict[int, float]:
    values = [score[i] for i in competing]
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return {i: (score[i] - mean) / deviation if deviation else 0.0 for i in competing}


def naive_kept(
    scores: list[list[float]], ranked: list[int], always: set[int], length: int, scope: str, combine: str | None,
    ratios: list[float], weights: list[float],
) -> list[int]:  # fmt: skip
    """Kept positions of the top-k policy, ascending."""
    kept: set[int] = set()
    for positions in sets_of(len(scores[0]), length, scope):
        competing = [i for i in positions if i in ranked]
        if combine == "sum" and competing:
            total = [0.0] * len(scores[0])
            for weight, score in zip(weights, scores, strict=True):
                for i, z in standardize(score, competing).items():
                    total[i] += weight * z
            kept |= top(total, competing, always, ratios[0])
        else:
            chosen = [top(score, competing, always, r) for score, r in zip(scores, ratios, strict=True)]
            kept |= set.union(*chosen) if combine == "union" else set.intersection(*chosen)
    return sorted(kept)


def micro_batch(valid: list[bool], length: int, label: list[int] | None = None, first_sample: int = 0) -> MicroBatch:
    shape = (-1, length)
    labels_bs = torch.tensor(label if label is not None else [0] * len(valid), dtype=torch.int64).view(shape)
    samples = torch.arange(first_sample, first_sample + len(valid) // length)
    return MicroBatch(labels_bs, labels_bs, torch.tensor(valid).view(shape), samples)


def statistics_of(loss: Any, entropy: Any = None) -> TokenStatistics:
    return TokenStatistics(
        torch.tensor(loss, dtype=torch.float32), None if entropy is None else torch.tensor(entropy, dtype=torch.float32)
    )
