"""Rank-side of runs whose sequences are cut over ranks: which tokens of which samples were kept, run after run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_slm.flags.load import parse
from megatron_slm.training.pretrain import pretrain
from megatron_slm.types import MicroBatch
from tests.support.runs import flags

Kept = set[tuple[int, int]]
"""Sample and position of the kept tokens."""


def train_in_turn(runs: list[dict[str, Any]]) -> list[Kept]:
    """Train several runs in one world; the tokens that this rank kept in each."""
    return [_train(values) for values in runs]


def _train(values: dict[str, Any]) -> Kept:
    kept: Kept = set()

    def observe(batch: MicroBatch, loss_N: Tensor, reference_N: Tensor | None, kept_K: Tensor) -> None:
        held = batch.labels_bs.shape[1]
        position_s = torch.arange(held) if batch.position_s is None else batch.position_s
        for row in kept_K.tolist():
            kept.add((int(batch.sample_b[row // held]), int(position_s[row % held])))

    config, _ = parse(flags(values))
    pretrain(config, observer=observe)
    return kept
