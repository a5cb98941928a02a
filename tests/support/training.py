"""Rank-side of whole-run tests: train in this process and tell what happened."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_slm.config.load import parse
from megatron_slm.training.main import pretrain
from megatron_slm.types import MicroBatch
from tests.support.runs import flags


def train_and_report(values: dict[str, Any]) -> dict[str, Any]:
    """Run a training; gives the kept tokens of every micro-batch that this rank saw, keyed by its tokens."""
    kept: list[tuple[bytes, list[int]]] = []

    def observe(batch: MicroBatch, token_loss_N: Tensor, reference_loss_N: Tensor | None, kept_K: Tensor) -> None:
        kept.append((batch.tokens_bs.numpy().tobytes(), kept_K.tolist()))

    config, _ = parse(flags(values))
    run = pretrain(config, observer=observe)
    optimizer = run.trainer.engine.optimizer
    return {
        "kept": kept,
        "optimizer": type(optimizer).__name__,
        "parameters": [p.detach().float().clone().numpy() for p in run.trainer.engine.module.parameters()],
        "step": run.position.step,
        "torch_rng": torch.get_rng_state().numpy(),
    }
