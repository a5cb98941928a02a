"""Rank-side of whole-run tests: train in this process and tell what happened."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from megatron_slm.checkpoint import save
from megatron_slm.checkpoint.fragments import fragments
from megatron_slm.config.load import parse
from megatron_slm.training.main import main, pretrain
from megatron_slm.types import MicroBatch
from tests.support.runs import flags


def train_and_report(values: dict[str, Any]) -> dict[str, Any]:
    """Run a training; what this rank saw and ended with."""
    kept: list[tuple[bytes, list[int]]] = []

    def observe(batch: MicroBatch, token_loss_N: Tensor, reference_loss_N: Tensor | None, kept_K: Tensor) -> None:
        kept.append((batch.tokens_bs.numpy().tobytes(), kept_K.tolist()))

    config, _ = parse(flags(values))
    run = pretrain(config, observer=observe)
    optimizer = run.trainer.engine.optimizer
    owned = [
        fragment.view(quantity).clone().numpy()
        for fragment in fragments(optimizer)
        for quantity in ("weight", "exp_avg", "exp_avg_sq")
    ]
    return {
        "kept": kept,
        "optimizer": type(optimizer).__name__,
        "parameters": [p.detach().float().clone().numpy() for p in run.trainer.engine.module.parameters()],
        "owned": owned,
        "step": run.position.step,
        "rng": torch.get_rng_state().numpy(),
    }


def train_drawing_random_numbers(values: dict[str, Any]) -> dict[str, Any]:
    """As above, with a random draw in every micro-batch, as a model with dropout would make."""
    real = MicroBatch.__new__

    def drawing(cls: type, *args: Any) -> MicroBatch:
        torch.rand(3)
        return real(cls, *args)

    MicroBatch.__new__ = staticmethod(drawing)  # type: ignore[method-assign, assignment]
    return train_and_report(values)


def train_and_die_while_saving(values: dict[str, Any], step: int, rank: int) -> None:
    """As above, but `rank` is killed while it writes the checkpoint of `step`."""
    real = save._write_fragments

    def dying(path: Any, *args: Any) -> None:
        real(path, *args)
        if f"step_{step:08d}" in str(path) and int(os.environ["RANK"]) == rank:
            os._exit(9)

    save._write_fragments = dying
    train_and_report(values)


def command(argv: list[str]) -> int:
    """The command itself; its exit code is this process's."""
    raise SystemExit(main(argv))
